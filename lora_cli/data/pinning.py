"""Copy tensors to page-locked memory, from which copies to a GPU are not waited for."""

import torch
from torch import Tensor

from lora_cli.data.collate import Batch


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    return torch.cuda.is_available()


def pin(tensor: Tensor) -> Tensor:
    """Return the tensor in page-locked memory; unchanged without a GPU."""
    return tensor.pin_memory() if has_gpu() else tensor


def pin_batch(batch: Batch) -> Batch:
    """Return the batch in page-locked memory; unchanged without a GPU."""
    return batch._replace(
        input_ids=pin(batch.input_ids),
        position_ids=pin(batch.position_ids),
        attention_mask=None if batch.attention_mask is None else pin(batch.attention_mask),
        label_positions=pin(batch.label_positions),
        targets=pin(batch.targets),
        extra={name: pin(tensor) for name, tensor in batch.extra.items()},
    )
