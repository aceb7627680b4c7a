"""How likely a model finds rows: loss, perplexity and accuracy per supervised token."""

import math
from typing import NamedTuple

import torch
from accelerate import Accelerator

from lora_cli.data.batches import Plan
from lora_cli.model.score import Scorer


class Likelihood(NamedTuple):
    """Means over all supervised tokens of the rows."""

    loss: float  # nats per supervised token
    accuracy: float  # share of supervised tokens that were the most likely one
    tokens: int  # supervised

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
    return Likelihood(loss / max(1.0, tokens), correct / max(1.0, tokens), int(tokens))
