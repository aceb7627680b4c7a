"""Batches: every tensor has memory of its own, which can be page-locked for a GPU."""

import pytest
import torch

from lora_cli.data.batches import BatchPlan
from tests.model import zoo


@pytest.mark.parametrize("packing", [True, False])
def test_no_tensor_of_a_batch_shares_memory_between_its_rows(packing: bool):
    plan = BatchPlan(zoo.rows_of([3, 9, 5]), packing=packing, size=30, batches_per_step=1, seed=0)
    batch = plan.make_batch([0, 1, 2])
    for name, value in batch._asdict().items():
        if isinstance(value, torch.Tensor):
            assert all(stride > 0 for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1), name
