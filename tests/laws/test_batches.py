"""Properties of batch plans: every row once, no batch too large, little padding, reproducible on every process."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import collate_packed, collate_padded
from lora_cli.data.packing import group_by_length, pack
from tests.model import zoo

CAPACITY = 100
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=200).map(lambda n: np.array(n, dtype=np.int32))


def text_like(count: int, longest: int, seed: int) -> np.ndarray:
    """Return log-normal lengths, int32 [count], similar to those of real rows."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 8), 0.8, count)
    return np.clip(drawn, 4, longest).astype(np.int32)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packing_uses_every_row_once_and_never_exceeds_capacity(lengths: np.ndarray, seed: int):
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = pack(lengths, order, CAPACITY)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(int(lengths[batch].sum()) for batch in batches) <= CAPACITY
    assert batches == pack(lengths, order, CAPACITY)
    # No two batches would fit into one.
    loads = sorted(int(lengths[batch].sum()) for batch in batches)
    assert len(loads) == 1 or loads[0] + loads[1] > CAPACITY


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40), st.integers(0, 99))
def test_packing_stays_within_eleven_ninths_of_the_optimum(cuts: list[int], seed: int):
    # Full bins, divided into rows: the optimum is known.
    rng = np.random.default_rng(seed)
    lengths = []
    for cut in cuts:
        borders = np.unique(np.append(rng.integers(1, CAPACITY, cut % 6), CAPACITY))
        lengths += np.diff(borders, prepend=0).tolist()
    batches = pack(np.array(lengths, np.int32), rng.permutation(len(lengths)), CAPACITY)
    assert len(batches) <= 11 / 9 * len(cuts) + 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "longest"), [(200, 512), (2000, 1024), (2000, 4096)])
def test_text_fills_packed_batches(rows: int, longest: int, seed: int):
    plan = BatchPlan(
        zoo.rows_of(text_like(rows, longest, seed)), packing=True, size=longest, batches_per_step=1, seed=seed
    )
    assert plan.token_share >= 0.95


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_similar_length_are_padded_together(seed: int):
    plan = BatchPlan(zoo.rows_of(text_like(2000, 1024, seed)), packing=False, size=8, batches_per_step=1, seed=seed)
    assert plan.token_share >= 0.9


@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.integers(0, 99))
def test_grouping_uses_every_row_once_in_full_batches(lengths: np.ndarray, size: int, seed: int):
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = group_by_length(lengths, order, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size
    assert batches == group_by_length(lengths, order, size)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_packed_and_padded_batches_have_the_same_labels(lengths: list[int], seed: int):
    rows = zoo.rows_of(lengths, seed=seed)
    encoded = [rows[i] for i in range(len(rows))]
    expected = {
        (row, position, int(encoded[row].labels[position + 1]))
        for row in range(len(encoded))
        for position in range(lengths[row] - 1)
        if encoded[row].labels[position + 1] != -100
    }
    for collate in (collate_packed, collate_padded):
        batch = collate(encoded, range(len(encoded)), 0)
        width = batch.input_ids.shape[1]
        row_at = torch.repeat_interleave(torch.tensor(lengths)) if batch.attention_mask is None else None
        flat = batch.label_positions
        row = row_at[flat] if row_at is not None else flat // width
        position = batch.position_ids.reshape(-1)[flat]
        triples = set(zip(row.tolist(), position.tolist(), batch.targets.tolist(), strict=True))
        assert triples == expected
        assert len(batch.label_positions) == len(expected)
        assert batch.tokens == sum(lengths)
        ids = batch.input_ids.reshape(-1)
        real = ids if batch.attention_mask is None else ids[batch.attention_mask.reshape(-1)]
        assert real.tolist() == np.concatenate([row.input_ids for row in encoded]).tolist()


def plans_of(
    lengths: list[int], *, packing: bool, size: int, batches_per_step: int, join: bool = False
) -> list[BatchPlan]:
    """Return the plan of the same rows for 1 to 8 processes."""
    rows = zoo.rows_of(lengths)
    return [
        BatchPlan(
            rows,
            packing=packing,
            size=size,
            batches_per_step=batches_per_step,
            seed=3,
            join=join,
            processes=processes,
        )
        for processes in range(1, 9)
    ]


@pytest.mark.parametrize("packing", [True, False])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), batches_per_step=st.integers(1, 9))
def test_processes_divide_each_step_without_loss_or_repetition(
    lengths: list[int], batches_per_step: int, packing: bool
):
    plans = plans_of(lengths, packing=packing, size=30 if packing else 3, batches_per_step=batches_per_step)
    alone = plans[0]
    for plan in plans:
        assert plan.steps_per_epoch == alone.steps_per_epoch
        for step in range(2 * plan.steps_per_epoch):
            batches = [batch for share in plan.shares_of_step(step) for batch in share]
            assert len({batch.position for batch in batches}) == len(batches)
            # The rows of a step are the same for any number of processes.
            expected = sorted(row for batch in alone.shares_of_step(step)[0] for row in batch.rows)
            assert sorted(row for batch in batches for row in batch.rows) == expected
            for batch in batches:
                assert 1 <= len(batch.rows) <= (30 if packing else 3)
                assert not packing or sum(lengths[row] for row in batch.rows) <= 30
        for epoch in range(2):
            steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
            rows = [
                row for step in steps for share in plan.shares_of_step(step) for batch in share for row in batch.rows
            ]
            assert sorted(rows) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("packing", "size", "batches_per_step", "join"),
    [(True, 1024, 16, False), (True, 1024, 16, True), (True, 1024, 36, False), (False, 4, 32, False)],
)
def test_processes_get_about_as_many_tokens_in_every_step(packing: bool, size: int, batches_per_step: int, join: bool):
    lengths = text_like(3000, 1024, 1)
    options: dict[str, Any] = {"packing": packing, "size": size, "batches_per_step": batches_per_step, "join": join}
    for plan in plans_of(lengths.tolist(), **options):
        for step in range(plan.steps_per_epoch):
            tokens = [sum(int(lengths[b.rows].sum()) for b in share) for share in plan.shares_of_step(step)]
            mean = sum(tokens) / len(tokens)
            assert max(tokens) <= 1.06 * mean or (step == plan.steps_per_epoch - 1 and max(tokens) <= mean + 512)


def test_joined_batches_are_one_batch_of_each_process():
    for plan in plans_of(text_like(500, 64, 2).tolist(), packing=True, size=64, batches_per_step=8, join=True):
        largest = 0
        for step in range(plan.steps_per_epoch):
            shares = plan.shares_of_step(step)
            assert [[batch.position for batch in share] for share in shares if share] == [
                [rank] for rank, share in enumerate(shares) if share
            ]
            largest = max([largest, *(int(plan.rows.lengths[b.rows].sum()) for share in shares for b in share)])
        assert plan.parts == max(1, 8 // plan.processes)
        assert plan.max_tokens == largest


def test_batches_stay_whole_where_that_is_even():
    """Random numbers belong to the position of a batch: so the step is the same for any number of processes."""
    plans = plans_of([20, 10] * 40, packing=True, size=30, batches_per_step=8)
    alone = {batch.position: batch.rows for batch in plans[0].shares_of_step(0)[0]}
    for processes in (2, 4, 8):
        shares = plans[processes - 1].shares_of_step(0)
        assert [len(share) for share in shares] == [8 // processes] * processes
        assert {batch.position: batch.rows for share in shares for batch in share} == alone


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_divide_the_batches_of_an_evaluation(world_size: int):
    plan = BatchPlan(zoo.rows_of([5, 9, 30, 12, 7, 22]), packing=True, size=30, batches_per_step=1, seed=3)
    rows = [i for rank in range(world_size) for b in plan.all_batches(rank=rank, world_size=world_size) for i in b.rows]
    assert sorted(rows) == list(range(6))


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_differ_and_are_available_in_any_order(packing: bool):
    rows = zoo.rows_of(text_like(60, 40, 0).tolist())
    plans = [
        BatchPlan(rows, packing=packing, size=40 if packing else 4, batches_per_step=2, seed=seed) for seed in (1, 1, 2)
    ]
    first, second = plans[0].epoch(0), plans[0].epoch(1)
    assert plans[1].epoch(1) == second
    assert plans[1].epoch(0) == first  # an earlier epoch again
    assert first != second
    assert plans[2].epoch(0) != first
