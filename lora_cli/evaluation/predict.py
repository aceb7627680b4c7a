"""What a classifier says of rows, beside what they are: the stuff that metrics are made of."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.data.collate import rows_of_labels
from lora_cli.model.loss import LossFunction


class Predictions(NamedTuple):
    """Every labelled unit of the rows, in the order of the plan."""

    kind: LabelKind
    names: tuple[str, ...]  # of the labels, or of the values of a regression
    wanted: npt.NDArray[np.float64]  # [units] class numbers; [units, labels] of 0 and 1; [units, values]
    predicted: npt.NDArray[np.float64]  # likewise
    row: npt.NDArray[np.int64]  # [units]: which row each belongs to, counted as they come


@torch.no_grad()
def predict(loss_fn: LossFunction, plan: BatchPlan, labels: ClassLabels) -> Predictions:
    """Run every row of `plan` once, in eval mode."""
    training = loss_fn.base.training
    loss_fn.base.eval()
    wanted, predicted, row, done = [], [], [], 0
    for batch in plan.all_batches():
        logits = loss_fn.logits(batch).float().cpu()
        wanted.append(batch.targets.double().numpy())
        predicted.append(_predicted(logits, labels).double().numpy())
        lines = np.arange(len(batch.rows)) if loss_fn.task == "seq-cls" else rows_of_labels(batch)
        row.append(done + lines)
        done += len(batch.rows)
    loss_fn.base.train(training)
    return Predictions(labels.kind, labels.names, *(np.concatenate(parts) for parts in (wanted, predicted, row)))


def _predicted(logits: torch.Tensor, labels: ClassLabels) -> torch.Tensor:
    if labels.kind == "regression":
        return logits
    return logits > 0 if labels.kind == "multi" else logits.argmax(dim=1)
