"""Loss, perplexity and accuracy of a model on held-out rows, per supervised token, word or row."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch, rows_of_labels
from lora_cli.data.prefetch import prefetch_all
from lora_cli.model.loss import LossFunction
from lora_cli.model.sharding import is_sharded
from lora_cli.recipe.tasks import TaskName

Stopping = Callable[[], bool]  # whether a signal has asked to stop


def never() -> bool:
    """Return False: nothing stops the evaluation."""
    return False


class Likelihood(NamedTuple):
    """Means over all units: supervised tokens, words or rows, depending on the task."""

    loss: float  # nats; for a regression, mean squared error
    accuracy: float | None  # share of the units whose most likely label is the target; None for a regression
    tokens: int  # number of units

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class RowLikelihoods(NamedTuple):
    """Loss and correct predictions of each row, in the order of the rows."""

    loss: NDArray[np.float64]  # [rows], summed over the row's units
    correct: NDArray[np.float64]  # [rows], units whose most likely label is the target
    units: NDArray[np.int64]  # [rows]
    has_accuracy: bool  # False for a regression, where `correct` has no meaning

    @property
    def overall(self) -> Likelihood:
        """Means over the units of all rows."""
        units = int(self.units.sum())
        accuracy = float(self.correct.sum()) / max(1, units)
        return Likelihood(float(self.loss.sum()) / max(1, units), accuracy if self.has_accuracy else None, units)


@torch.no_grad()
def measure_row_likelihoods(
    loss_fn: LossFunction, plan: BatchPlan, *, accelerator: Accelerator | None = None, stopping: Stopping = never
) -> RowLikelihoods:
    """Compute the loss of every row of `plan` once, in eval mode, separately for each row.

    The batches are divided among the processes of `accelerator`; each process returns all rows. Once `stopping` returns
    True, the other batches are left out.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    training = loss_fn.base.training
    loss_fn.base.eval()
    measured: list[tuple[NDArray[np.int64], Tensor, Tensor]] = []  # on the device until all are computed
    for batch, counts in _batches(loss_fn, plan, rank, world):
        if stopping():
            break
        losses, is_correct = loss_fn.per_token(batch)
        if not counts:
            continue
        within_batch = np.arange(len(batch.rows)) if loss_fn.task == "seq-cls" else rows_of_labels(batch)
        measured.append((np.array(batch.rows)[within_batch], losses.double(), is_correct.double()))
    loss_fn.base.train(training)
    count = len(plan.rows)
    loss, correct, units = np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.int64)
    if measured:
        all_rows, all_losses, all_correct = zip(*measured, strict=True)
        rows = np.concatenate(all_rows)  # of each unit, as the two others
        # One transfer of all: the host waits for a GPU once.
        both = torch.stack((torch.cat(all_losses), torch.cat(all_correct))).cpu().numpy()
        np.add.at(loss, rows, both[0])
        np.add.at(correct, rows, both[1])
        np.add.at(units, rows, 1)
    if accelerator is not None and world > 1:
        # A row is in the batch of one process, and zero in all others.
        own = torch.from_numpy(np.stack([loss, correct, units])).to(loss_fn.device)
        loss, correct, counts = accelerator.reduce(own, reduction="sum").cpu().numpy()
        units = counts.astype(np.int64)
    return RowLikelihoods(loss, correct, units, not _is_regression(loss_fn))


@torch.no_grad()
def measure_likelihood(
    loss_fn: LossFunction, plan: BatchPlan, *, accelerator: Accelerator | None = None, stopping: Stopping = never
) -> Likelihood:
    """Compute the mean loss over `plan` once, in eval mode, with the batches divided among the processes.

    Once `stopping` returns True, the other batches are left out.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    training = loss_fn.base.training
    loss_fn.base.eval()
    # fp64: a sum over millions of tokens must not depend on how they were batched.
    totals = torch.zeros(2, dtype=torch.float64, device=loss_fn.device)
    tokens = 0
    for batch, counts in _batches(loss_fn, plan, rank, world):
        if stopping():
            break
        result = loss_fn(batch)
        if not counts:
            continue
        totals += torch.stack([result.loss.double(), result.correct.double()])
        tokens += result.tokens
    loss_fn.base.train(training)
    if accelerator is not None and world > 1:
        both = accelerator.reduce(torch.cat([totals, totals.new_tensor([tokens])]), reduction="sum")
        totals, tokens = both[:2], int(both[2])
    loss, correct = totals.tolist()
    accuracy = None if _is_regression(loss_fn) else correct / max(1, tokens)
    return Likelihood(loss / max(1, tokens), accuracy, tokens)


def _batches(loss_fn: LossFunction, plan: BatchPlan, rank: int, world: int) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of process `rank`, and whether each counts.

    All processes gather the layers of a sharded base together, so that each runs as many batches: some of them twice.
    """
    last = None
    for last in prefetch_all(plan, device=loss_fn.device, rank=rank, world_size=world):
        yield last, True
    if is_sharded(loss_fn.base) and plan.batches_per_epoch % world > 0 and rank >= plan.batches_per_epoch % world:
        yield last or plan.make_batch(plan.epoch(0)[0]), False


def _is_regression(loss_fn: LossFunction) -> bool:
    return getattr(loss_fn.base.config, "problem_type", None) == "regression"


def describe_likelihood(likelihood: Likelihood, task: TaskName) -> str:
    """Return one line for the user; only language models have a perplexity, which is per token."""
    if likelihood.accuracy is None:
        return f"mean squared error {likelihood.loss:.4f}"
    accuracy = f"accuracy {likelihood.accuracy:.1%}"
    if task in ("causal-lm", "seq2seq-lm"):
        return f"loss {likelihood.loss:.4f}, perplexity {likelihood.perplexity:.2f}, token {accuracy}"
    return f"loss {likelihood.loss:.4f}, {accuracy}"
