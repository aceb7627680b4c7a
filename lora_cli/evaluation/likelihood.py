"""How likely a model finds rows: loss, perplexity and accuracy per supervised token, word or row."""

import math
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import rows_of_labels
from lora_cli.model.loss import LossFunction
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


class RowLikelihoods(NamedTuple):
    """What was measured of each row, in the order of the rows."""

    loss: NDArray[np.float64]  # [rows], summed over the row's units
    hits: NDArray[np.float64]  # [rows], units whose most likely label was the right one
    units: NDArray[np.int64]  # [rows]
    counted: bool  # hits mean something: not of a regression

    @property
    def whole(self) -> Likelihood:
        """Means over all units."""
        units = int(self.units.sum())
        share = float(self.hits.sum()) / max(1, units)
        return Likelihood(float(self.loss.sum()) / max(1, units), share if self.counted else None, units)


@torch.no_grad()
def measure_row_likelihoods(loss_fn: LossFunction, plan: BatchPlan) -> RowLikelihoods:
    """Score every row of `plan` once, in eval mode, each by itself."""
    training = loss_fn.base.training
    loss_fn.base.eval()
    count = len(plan.rows)
    loss, hits, units = np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.int64)
    for batch in plan.all_batches():
        losses, right = loss_fn.per_token(batch)
        rows = np.array(batch.rows)[rows_of_labels(batch) if loss_fn.task != "seq-cls" else np.arange(len(batch.rows))]
        np.add.at(loss, rows, losses.double().cpu().numpy())
        np.add.at(hits, rows, right.double().cpu().numpy())
        np.add.at(units, rows, 1)
    loss_fn.base.train(training)
    return RowLikelihoods(loss, hits, units, getattr(loss_fn.base.config, "problem_type", None) != "regression")


@torch.no_grad()
def measure_likelihood(loss_fn: LossFunction, plan: BatchPlan, *, accelerator: Accelerator | None = None) -> Likelihood:
    """Score every row of `plan` once, in eval mode, shared among the processes of `accelerator`."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    training = loss_fn.base.training
    loss_fn.base.eval()
    # fp64: a sum over millions of tokens must not depend on how they were batched.
    totals = torch.zeros(3, dtype=torch.float64, device=loss_fn.device)
    for batch in plan.all_batches(rank=rank, world=world):
        scored = loss_fn(batch)
        totals += torch.stack([scored.loss.double(), scored.correct.double(), totals.new_tensor(scored.tokens)])
    loss_fn.base.train(training)
    if accelerator is not None:
        totals = accelerator.reduce(totals, reduction="sum")
    loss, correct, tokens = (float(value) for value in totals)
    accuracy = (
        None if getattr(loss_fn.base.config, "problem_type", None) == "regression" else correct / max(1.0, tokens)
    )
    return Likelihood(loss / max(1.0, tokens), accuracy, int(tokens))


def describe_likelihood(found: Likelihood, task: TaskName) -> str:
    """A line for the user: of language models with perplexity, which is about tokens."""
    if found.accuracy is None:
        return f"mean squared error {found.loss:.4f}"
    if task in ("causal-lm", "seq2seq-lm"):
        return f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, token accuracy {found.accuracy:.1%}"
    return f"loss {found.loss:.4f}, accuracy {found.accuracy:.1%}"
