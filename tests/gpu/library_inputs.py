"""Arguments of a causal model's forward, with labels, from a batch: what plain PEFT and TRL train on."""

import torch
from torch import Tensor

from lora_cli.data.collate import Batch
from lora_cli.data.label_mask import IGNORE_INDEX


def library_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return input_ids and labels, int64 [rows, L] each, with attention_mask, or of packed rows position_ids.

    Labels are not shifted. From positions that begin again, transformers finds packed rows and keeps them apart.
    """
    labels = torch.full(batch.input_ids.shape, IGNORE_INDEX)
    width = labels.shape[1]
    # The batch has the position that predicts a label, which is one before the label's own.
    labels[batch.label_positions // width, batch.label_positions % width + 1] = batch.targets
    inputs = {"input_ids": batch.input_ids, "labels": labels}
    if batch.attention_mask is None:
        return {**inputs, "position_ids": batch.position_ids}
    return {**inputs, "attention_mask": batch.attention_mask.long()}
