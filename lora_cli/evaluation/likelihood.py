"""How likely a model finds rows: loss, perplexity and accuracy per supervised token, word or row."""

import math
from typing import NamedTuple

import torch
from accelerate import Accelerator

from lora_cli.data.batches import Plan
from lora_cli.model.score import Scorer
from lora_cli.recipe.tasks import TaskName


class Likelihood(NamedTuple):
    """Means over all supervised tokens, words or rows, as the task has it."""

    loss: float  # nats; of a regression, mean squared error
    accuracy: float | None  # share of them whose most likely label was the right one; None of a regression
    tokens: int  # their number

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def measure(scorer: Scorer, plan: Plan, *, accelerator: Accelerator | None = None) -> Likelihood:
    """Score every row of `plan` once, in eval mode, shared among the processes of `accelerator`."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    training = scorer.base.training
    scorer.base.eval()
    # fp64: a sum over millions of tokens must not depend on how they were batched.
    totals = torch.zeros(3, dtype=torch.float64, device=scorer.device)
    for batch in plan.whole(rank=rank, world=world):
        scored = scorer(batch)
        totals += torch.stack([scored.loss.double(), scored.correct.double(), totals.new_tensor(scored.tokens)])
    scorer.base.train(training)
    if accelerator is not None:
        totals = accelerator.reduce(totals, reduction="sum")
    loss, correct, tokens = (float(value) for value in totals)
    accuracy = None if getattr(scorer.base.config, "problem_type", None) == "regression" else correct / max(1.0, tokens)
    return Likelihood(loss / max(1.0, tokens), accuracy, int(tokens))


def shown(found: Likelihood, task: TaskName) -> str:
    """A line for the user: of language models with perplexity, which is about tokens."""
    if found.accuracy is None:
        return f"mean squared error {found.loss:.4f}"
    if task in ("causal-lm", "seq2seq-lm"):
        return f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, token accuracy {found.accuracy:.1%}"
    return f"loss {found.loss:.4f}, accuracy {found.accuracy:.1%}"
