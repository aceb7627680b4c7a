"""Losses of a run's held-out rows, as `lora eval` or a checkpoint has recorded them, and intervals. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lora_cli.evaluation import bootstrap
from lora_cli.report.compare import MIN_ROWS, RowLossIntervals
from lora_cli.report.recorded_run import RecordedRun, as_list, as_object

ROW_LOSSES = "eval_rows.safetensors"  # in the checkpoints of a run that keeps the best step


class RowLosses(NamedTuple):
    """Losses of the held-out rows under a run's adapter."""

    loss: NDArray[np.float64]  # [rows], summed over the row's units
    units: NDArray[np.int64]  # [rows]
    data: str  # identity of the rows
    source: str  # for people

    @property
    def usable(self) -> bool:
        """Whether an interval can be computed."""
        sized = self.loss.shape == self.units.shape and self.loss.ndim == 1 and len(self.loss) >= MIN_ROWS
        return bool(sized and np.isfinite(self.loss).all() and (self.units >= 0).all() and self.units.sum() > 0)


def row_loss_intervals(runs: Sequence[RecordedRun]) -> dict[str, RowLossIntervals]:
    """Return the intervals of each run whose rows' losses are recorded, by the run's name."""
    found = {run.name: losses for run in runs if (losses := read_row_losses(run)) is not None}
    first = found.get(runs[0].name) if runs else None
    result = {}
    for name, losses in found.items():
        own = bootstrap.mean_interval(losses.loss, losses.units)
        versus = None
        if first is not None and first is not losses and _same_rows(first, losses):
            below = bootstrap.difference_interval(losses.loss, first.loss, losses.units)
            versus = (below.value, below.low, below.high)
        rows = len(losses.units)
        result[name] = RowLossIntervals((own.value, own.low, own.high), rows, losses.source, versus)
    return result


def _same_rows(first: RowLosses, second: RowLosses) -> bool:
    return first.data == second.data and np.array_equal(first.units, second.units)


def read_row_losses(run: RecordedRun) -> RowLosses | None:
    """Return the losses of rows under the run's written adapter; None if they are not recorded."""
    candidates = [*_of_measurements(run), *_of_checkpoint(run)]
    return next((losses for losses in candidates if losses.usable), None)


def _of_measurements(run: RecordedRun) -> list[RowLosses]:
    found = []
    for measured in run.measurements:
        content = measured.content
        name = next((n for n, digest in as_object(content.get("adapters")).items() if digest == run.adapter), None)
        if name is None or run.adapter is None:
            continue
        try:
            loss = np.array(as_list(as_object(content.get("losses_of_rows")).get(name)), np.float64)
            units = np.array(as_list(content.get("units_of_rows")), np.int64)
        except (TypeError, ValueError, OverflowError):  # a damaged file
            continue
        found.append(RowLosses(loss, units, str(content.get("data")), measured.file))
    return found


def _of_checkpoint(run: RecordedRun) -> list[RowLosses]:
    """Return the losses that a checkpoint has of the step of the adapter, if the run keeps the best step."""
    step, data = run.adapter_step, run.manifest.get("data_fingerprint")
    if step is None or data is None:
        return []
    found = []
    for file in sorted((run.folder / "checkpoints").glob(f"step-*/{ROW_LOSSES}"), reverse=True):
        losses = _read_checkpoint(file, step)
        if losses is not None:
            found.append(RowLosses(*losses, str(data), f"checkpoint {file.parent.name}"))
    return found


def _read_checkpoint(file: Path, step: int) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError):
        return None
    loss, units = tensors.get(f"loss|{step}"), tensors.get(f"units|{step}")
    return None if loss is None or units is None else (loss.astype(np.float64), units.astype(np.int64))
