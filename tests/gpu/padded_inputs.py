"""Arguments of a causal model's forward, with labels, from a padded batch: what plain PEFT and TRL train on."""

import torch
from torch import Tensor

from lora_cli.data.collate import Batch
from lora_cli.data.label_mask import IGNORE_INDEX


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels, int64 [rows, L] each; labels are not shifted."""
    assert batch.attention_mask is not None
    labels = torch.full(batch.input_ids.shape, IGNORE_INDEX)
    width = labels.shape[1]
    # The batch has the position that predicts a label, which is one before the label's own.
    labels[batch.label_positions // width, batch.label_positions % width + 1] = batch.targets
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": labels}
