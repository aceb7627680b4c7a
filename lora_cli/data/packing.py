"""Pack rows into batches by best fit, or group rows of similar length for padding. Pure: no tokenizer, no torch."""

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each row, longest first, goes where it leaves the least room.

    Rows of one length are taken in `order`. No row is split, and none may be longer than `capacity` tokens.
    (Johnson 1974; at most 11/9 of the fewest possible batches, in practice within 1 % on text.)
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    batches: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens of room -> batches that have it
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
        left = room - length
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room[left].append(batch)
    return batches


def group_by_length(lengths: NDArray[np.int32], order: NDArray[np.int64], size: int) -> list[list[int]]:
    """Batches of `size` rows of similar length, so that little is padded; rows mix within 50 batches of `order`."""
    window = size * 50
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + size].tolist() for i in range(0, len(part), size)]
    return batches
