"""Prefetch batches in a thread, in pinned memory, while the GPU computes the present one."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.data.pinning import pin_batch

StepBatches = list[tuple[int, Batch]]  # the batches of one step for a process, with their positions in it
Item = TypeVar("Item", StepBatches, Batch)


def prefetch_steps(
    plan: BatchPlan, start: int, total: int, *, rank: int, device: torch.device
) -> Generator[StepBatches]:
    """Yield the batches of the steps `start` to `total` - 1 for process `rank`.

    Only this function may use `plan.epoch` meanwhile.
    """
    steps = (plan.batches_of_step(number, rank=rank) for number in range(start, total))
    return _prefetch(([(position, pin_batch(batch)) for position, batch in step] for step in steps), device)


def prefetch_all(plan: BatchPlan, *, device: torch.device, rank: int = 0, world_size: int = 1) -> Generator[Batch]:
    """Yield every batch of `rank` once, in a fixed order, for evaluation."""
    return _prefetch(map(pin_batch, plan.all_batches(rank=rank, world_size=world_size)), device)


def _prefetch(items: Iterator[Item], device: torch.device) -> Generator[Item]:
    """Yield what `items` yields; on a GPU, the next one is made meanwhile.

    On the CPU a second thread would take a core from the step.
    """
    if device.type == "cpu":
        yield from items
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item
