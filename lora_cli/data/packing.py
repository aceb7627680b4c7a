"""Packing: fill batches with rows by best fit; without packing, group rows by length. Pure: no tokenizer, no torch."""

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Pack rows into batches of at most `capacity` tokens by best-fit decreasing bin packing.

    Each row, longest first, goes to the batch in which it leaves the least room. Rows of the same length are taken in
    `order`. No row is split, and none may be longer than `capacity`. The result has at most 11/9 of the minimum number
    of batches (Johnson 1974); on text, it is within 1 % of the minimum.

    Args:
        lengths: int32 [rows], in tokens.
        order: int64 [rows], a permutation of the row indices.
        capacity: tokens of a batch.

    Returns:
        The row indices of each batch.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    batches: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # free tokens -> batches with that many
    rooms: list[int] = []  # the keys of with_room, ascending
    for index in longest_first.tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            batches.append([])
            batch, room = len(batches) - 1, capacity
        else:
            room = rooms[at]
            batch = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        batches[batch].append(index)
        remaining = room - length
        if remaining:
            if remaining not in with_room:
                insort(rooms, remaining)
            with_room[remaining].append(batch)
    return batches


def group_by_length(lengths: NDArray[np.int32], order: NDArray[np.int64], size: int) -> list[list[int]]:
    """Group rows of similar length into batches of `size` rows, which reduces padding.

    Rows are sorted by length within windows of 50 batches of `order`.

    Args:
        lengths: int32 [rows], in tokens.
        order: int64 [rows], a permutation of the row indices.
        size: rows of a batch.

    Returns:
        The row indices of each batch.
    """
    window = size * 50
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + size].tolist() for i in range(0, len(part), size)]
    return batches
