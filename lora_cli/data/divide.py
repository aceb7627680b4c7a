"""Divide the batches of an optimizer step among processes: whole where that is even, else row by row. No tensors."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.packing import pack

EVEN = 1.05  # largest share of a process, in tokens, relative to the mean, at which batches stay whole


class PlannedBatch(NamedTuple):
    """A batch before its tensors are made."""

    position: int  # in the step, over all processes: no two batches of a step have the same
    rows: list[int]


def balance(batches: list[list[int]], lengths: NDArray[np.int32], *, count: int, size: int) -> list[list[int]]:
    """Return the rows of the packed `batches` of a step in `count` batches of about as many tokens each.

    The batches are as given if they are even already, or if the rows do not fit otherwise.

    Args:
        batches: row indices of each batch, at most `count` batches.
        lengths: int32 [rows], in tokens.
        count: batches of a full step.
        size: tokens that a batch has room for.
    """
    if count == 1:
        return batches
    tokens = [int(lengths[batch].sum()) for batch in batches]
    if len(batches) == count and max(tokens) * count <= EVEN * sum(tokens):
        return batches
    balanced = [share for share in _share_out(batches, lengths, count) if share]
    return balanced if max(int(lengths[share].sum()) for share in balanced) <= size else batches


def divide(
    batches: Sequence[list[int]], lengths: NDArray[np.int32], *, processes: int, size: int, packing: bool
) -> list[list[PlannedBatch]]:
    """Return the batches of a step for each process.

    Batches stay whole if each process has as many of a packed step, which are balanced, or else about as many tokens:
    random numbers belong to the position of a batch, so that the step is the same for any number of processes.
    Otherwise the rows of the step are divided, and each process makes batches of its own rows.

    Args:
        batches: row indices of the step's batches.
        lengths: int32 [rows], in tokens.
        processes: of the run.
        size: tokens of a batch with packing, rows of a batch without.
        packing: whether batches are packed.
    """
    whole = [
        [PlannedBatch(position, batches[position]) for position in range(rank, len(batches), processes)]
        for rank in range(processes)
    ]
    if (packing and len(batches) % processes == 0) or evenness(whole, lengths) >= 1 / EVEN:
        return whole
    divided = []
    for rank, share in enumerate(_share_out(batches, lengths, processes)):
        made = pack(lengths, np.array(share, dtype=np.int64), size) if packing else _in_turn(share, size)
        divided.append([PlannedBatch(rank + number * processes, batch) for number, batch in enumerate(made)])
    return divided


def evenness(shares: Sequence[Sequence[PlannedBatch]], lengths: NDArray[np.int32]) -> float:
    """Return the mean share of a process in tokens, relative to the largest: the part of a step that it computes."""
    tokens = [sum(int(lengths[batch.rows].sum()) for batch in share) for share in shares]
    return sum(tokens) / len(tokens) / max(tokens)


def _share_out(batches: Sequence[list[int]], lengths: NDArray[np.int32], count: int) -> list[list[int]]:
    """Return the rows of `batches` in `count` shares of about as many tokens each; a share may have none.

    Each row, the longest first, is added to the share with the fewest tokens so far (LPT, Graham 1969): the largest
    share has at most 4/3 of the tokens of the best division.
    """
    rows = np.array([row for batch in batches for row in batch])
    shares: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, number) for number in range(count)]
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        tokens, number = heapq.heappop(smallest)
        shares[number].append(row)
        heapq.heappush(smallest, (tokens + int(lengths[row]), number))
    return shares


def _in_turn(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
