"""Prefetch the batches of the next step in a thread, in pinned memory, while the GPU computes the present one."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch

StepBatches = list[tuple[int, Batch]]  # the batches of one step for this process, with their positions in it


def prefetch(plan: BatchPlan, start: int, total: int, *, rank: int, device: torch.device) -> Generator[StepBatches]:
    """Yield the batches of the steps `start` to `total` - 1; on a GPU, those of the next step are made meanwhile.

    On the CPU a second thread would take a core from the step. Only this function may use `plan.epoch` meanwhile.
    """
    if device.type == "cpu":
        for number in range(start, total):
            yield list(plan.batches_of_step(number, rank=rank))
        return

    def make(number: int) -> StepBatches:
        batches = plan.batches_of_step(number, rank=rank)
        return [(position, pin(batch)) for position, batch in batches]

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = thread.submit(make, start) if start < total else None
        for number in range(start, total):
            assert waiting is not None
            batches = waiting.result()
            waiting = thread.submit(make, number + 1) if number + 1 < total else None
            yield batches


def pin(batch: Batch) -> Batch:
    """Return the batch in page-locked memory, from which copies to a GPU do not wait; unchanged without a GPU."""
    if not torch.cuda.is_available():
        return batch
    return batch._replace(
        input_ids=batch.input_ids.pin_memory(),
        position_ids=batch.position_ids.pin_memory(),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.pin_memory(),
        label_positions=batch.label_positions.pin_memory(),
        targets=batch.targets.pin_memory(),
        extra={name: tensor.pin_memory() for name, tensor in batch.extra.items()},
    )
