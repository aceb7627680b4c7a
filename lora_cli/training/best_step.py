"""Evaluation history of a run: the best step, early stopping, and the losses of each row, saved in checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

ROW_LOSSES = "eval_rows.safetensors"  # in a checkpoint of a run that keeps the best step


class Evaluated(NamedTuple):
    """One evaluation."""

    step: int  # 0: before training
    loss: float  # mean over the units of all held-out rows


class RowLosses(NamedTuple):
    """Losses of the held-out rows at one step."""

    loss: NDArray[np.float64]  # [rows], summed over the row's units
    units: NDArray[np.int64]  # [rows]


class EvaluationHistory:
    """The evaluations of a run so far; checkpoints store it, so that a resumed run knows the same best step."""

    def __init__(self, *, start_is_candidate: bool) -> None:
        """With `start_is_candidate`, step 0 can be the best: the run continues an adapter that was trained before."""
        self.evaluations: list[Evaluated] = []
        self.rows: dict[int, RowLosses] = {}  # of step 0, the best and the last evaluation
        self._start_is_candidate = start_is_candidate

    def clear(self) -> None:
        """Forget all evaluations: the run starts from step 0."""
        self.evaluations, self.rows = [], {}

    def add(self, step: int, loss: float, rows: RowLosses | None = None) -> None:
        """Add the evaluation of `step`; `rows` are the losses of its rows, if they are kept."""
        self.evaluations.append(Evaluated(step, loss))
        if rows is not None:
            self.rows[step] = rows
            needed = {0, step, self.best.step if self.best else step}
            self.rows = {number: losses for number, losses in self.rows.items() if number in needed}

    @property
    def best(self) -> Evaluated | None:
        """The candidate with the lowest loss, the earliest if several are equal; None before any evaluation.

        Step 0 is no candidate unless it is an adapter that was trained before: a fresh adapter has learned nothing.
        """
        candidates = [e for e in self.evaluations if e.step > 0 or self._start_is_candidate]
        return min(candidates, key=lambda e: e.loss, default=None)

    @property
    def start(self) -> Evaluated | None:
        """The evaluation before training."""
        return next((e for e in self.evaluations if e.step == 0), None)

    @property
    def last(self) -> Evaluated | None:
        """The newest evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def without_gain(self) -> int:
        """Number of evaluations since the lowest loss; step 0 counts as the first one to be below."""
        losses = [e.loss for e in self.evaluations]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def should_stop(self, stop_after: int | None) -> bool:
        """Return whether `stop_after` evaluations in a row had no lower loss."""
        return stop_after is not None and self.without_gain >= stop_after

    def to_json(self) -> list[list[float]]:
        """Return [step, loss] of each evaluation."""
        return [[e.step, e.loss] for e in self.evaluations]

    def save_rows(self, folder: Path) -> None:
        """Write the losses of rows into the folder of a checkpoint; nothing if none are kept."""
        if self.rows:
            tensors = {f"{name}|{step}": value for step, rows in self.rows.items() for name, value in _arrays(rows)}
            save_file(tensors, folder / ROW_LOSSES)

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Load the history from a checkpoint's folder and its `state`."""
        self.evaluations = [Evaluated(int(step), float(loss)) for step, loss in state.get("evaluations", [])]
        file = folder / ROW_LOSSES
        tensors = load_file(file) if file.is_file() else {}
        steps = {int(name.partition("|")[2]) for name in tensors}
        self.rows = {n: RowLosses(tensors[f"loss|{n}"].numpy(), tensors[f"units|{n}"].numpy()) for n in steps}


def _arrays(rows: RowLosses) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.from_numpy(value.copy())) for name, value in rows._asdict().items()]
