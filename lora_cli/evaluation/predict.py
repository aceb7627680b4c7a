"""Predictions of a classification head (logits to classes or values) next to the targets: the input of metrics."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.data.collate import rows_of_labels
from lora_cli.data.prefetch import prefetch_all
from lora_cli.model.loss import LossFunction


class Predictions(NamedTuple):
    """Targets and predictions of every labeled unit, in the order of the batches; a unit is a row or a word."""

    kind: LabelKind
    names: tuple[str, ...]  # of the labels, or of the values of a regression
    targets: npt.NDArray[np.float64]  # [units] class ids; [units, labels] of 0 and 1; [units, values]
    predicted: npt.NDArray[np.float64]  # same shape and meaning as `targets`
    row: npt.NDArray[np.int64]  # [units]: number of the row that the unit belongs to, in the order of the batches


@torch.no_grad()
def predict(loss_fn: LossFunction, plan: BatchPlan, labels: ClassLabels) -> Predictions:
    """Run the model over every row of `plan` once, in eval mode, and return its predictions."""
    training = loss_fn.base.training
    loss_fn.base.eval()
    targets, predicted, row, rows_done = [], [], [], 0
    for batch in prefetch_all(plan, device=loss_fn.device):
        predicted.append(_decode(loss_fn.logits(batch).float(), labels))
        targets.append(batch.targets.double().numpy())
        within_batch = np.arange(len(batch.rows)) if loss_fn.task == "seq-cls" else rows_of_labels(batch)
        row.append(rows_done + within_batch)
        rows_done += len(batch.rows)
    loss_fn.base.train(training)
    # One transfer of all: the host waits for a GPU once.
    values = torch.cat(predicted).double().cpu().numpy()
    return Predictions(labels.kind, labels.names, np.concatenate(targets), values, np.concatenate(row))


def _decode(logits: torch.Tensor, labels: ClassLabels) -> torch.Tensor:
    """Return class ids [units] int64, or [units, labels] bool of a multi-label task, or the values of a regression."""
    if labels.kind == "regression":
        return logits
    return logits > 0 if labels.kind == "multi" else logits.argmax(dim=1)
