"""Batches of the next step are made in a thread while a GPU computes; they are those that the plan has."""

import threading
from typing import Any

import pytest
import torch

from lora_cli.data import pinning
from lora_cli.data.batches import BatchPlan
from lora_cli.data.pinning import pin_batch
from lora_cli.data.prefetch import prefetch_all, prefetch_steps
from tests.model import zoo

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def make_plan() -> BatchPlan:
    return BatchPlan(zoo.rows_of([3, 41, 12, 7, 30, 2, 19]), packing=True, size=50, batches_per_step=2, seed=1)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("start", "total"), [(0, 5), (3, 7), (4, 4)])
def test_the_batches_are_those_of_the_plan(device: torch.device, start: int, total: int):
    expected = [list(make_plan().batches_of_step(number)) for number in range(start, total)]
    found = list(prefetch_steps(make_plan(), start, total, rank=0, device=device))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [position for position, _ in one] == [position for position, _ in other]
        assert all(torch.equal(a.input_ids, b.input_ids) for (_, a), (_, b) in zip(one, other, strict=True))


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_the_batches_of_an_evaluation_are_those_of_the_plan(device: torch.device, rank: int, world_size: int):
    expected = [batch.rows for batch in make_plan().all_batches(rank=rank, world_size=world_size)]
    found = [batch.rows for batch in prefetch_all(make_plan(), device=device, rank=rank, world_size=world_size)]
    assert found == expected != []


def test_the_next_step_is_made_while_the_present_one_is_computed(monkeypatch: pytest.MonkeyPatch):
    plan, made = make_plan(), threading.Semaphore(0)
    threads: set[str] = set()
    batches_of_step = BatchPlan.batches_of_step

    def count(self: BatchPlan, number: int, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        yield from batches_of_step(self, number, **options)
        made.release()

    monkeypatch.setattr(BatchPlan, "batches_of_step", count)
    steps = prefetch_steps(plan, 0, 4, rank=0, device=GPU)
    next(steps)
    assert all(made.acquire(timeout=30) for _ in range(2))  # nobody has asked for the second step yet
    steps.close()
    assert all(name.startswith("prefetch") for name in threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_of_the_thread_is_raised_at_its_step(monkeypatch: pytest.MonkeyPatch):
    batches_of_step = BatchPlan.batches_of_step

    def fail(self: BatchPlan, number: int, **options: Any) -> Any:
        if number == 1:
            raise ValueError("a row changed")
        return batches_of_step(self, number, **options)

    monkeypatch.setattr(BatchPlan, "batches_of_step", fail)
    steps = prefetch_steps(make_plan(), 0, 4, rank=0, device=GPU)
    next(steps)
    with pytest.raises(ValueError, match="a row changed"):
        next(steps)


def test_every_tensor_of_a_batch_is_pinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    batch = make_plan().make_batch([0, 1])._replace(extra={"token_type_ids": torch.zeros(2)})
    assert pin_batch(batch) == batch
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(pinning, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    found = pin_batch(batch)
    assert found._replace(extra=batch.extra) == batch
    tensors = [value for value in batch if isinstance(value, torch.Tensor)]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in (*tensors, *batch.extra.values())}


@pytest.mark.parametrize("packing", [True, False])
def test_no_values_of_a_batch_share_memory(packing: bool):
    """torch copies into pinned memory of the same strides, and refuses if several values are in one place there."""
    plan = BatchPlan(zoo.rows_of([3, 5, 2]), packing=packing, size=10, batches_per_step=1, seed=1)
    batch = plan.make_batch([0, 1, 2])
    tensors = [value for value in (*batch, *batch.extra.values()) if isinstance(value, torch.Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
