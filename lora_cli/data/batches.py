"""Which rows meet in which batch of which step: best-fit packing or padding, from lengths and a seed alone.

The plan is a pure function of (lengths, seed, epoch), the same on every process and after every restart, so the
position in the data is nothing but the number of the last step.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.rows import Row

IGNORED = -100  # label of a token without loss, as everywhere in the field


class RowSource(Protocol):
    """What a plan needs of encoded rows."""

    lengths: NDArray[np.int32]

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class Batch(NamedTuple):
    """One device batch, and the positions in it that predict a supervised token."""

    input_ids: Tensor  # int64 [1, T] packed, [rows, L] padded
    position_ids: Tensor  # int64, like input_ids; restarts at 0 in each row
    attention_mask: Tensor | None  # bool like input_ids, True on tokens; None where packed
    lengths: tuple[int, ...]  # tokens of each row, in order
    predict: Tensor  # int64 [n]: positions in the flattened input_ids whose next token is supervised
    targets: Tensor  # int64 [n]: those next tokens
    rows: tuple[int, ...]  # indices into the row source

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)


class Plan:
    """The batches of a whole training run, step by step, for one process out of `world`."""

    def __init__(self, rows: RowSource, *, packing: bool, size: int, per_step: int, seed: int, pad_id: int = 0) -> None:
        """`size` is tokens a batch with packing, rows a batch without; `per_step` counts batches of all processes."""
        self.rows = rows
        self.packing = packing
        self.size = size
        self.per_step = per_step
        self.seed = seed
        self.pad_id = pad_id
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.batches_per_epoch = len(self.epoch(0))
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / per_step)

    def steps_in(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Optimizer steps of a run, of which one of the two says the length."""
        return max_steps or max(1, round((epochs or 1.0) * self.steps_per_epoch))

    @property
    def largest(self) -> int:
        """Tokens of the largest batch, padding included."""
        lengths = self.rows.lengths
        if self.packing:
            return max(int(lengths[batch].sum()) for batch in self.epoch(0))
        return max(int(lengths[batch].max()) * len(batch) for batch in self.epoch(0))

    @property
    def fill(self) -> float:
        """Share of what the batches compute that is real tokens; what is missing is padding, or room at their end."""
        lengths, batches = self.rows.lengths, self.epoch(0)
        room = [self.size if self.packing else int(lengths[batch].max()) * len(batch) for batch in batches]
        return float(lengths.sum(dtype=np.int64)) / sum(room)

    def epoch(self, number: int) -> list[list[int]]:
        """Row indices of each batch of epoch `number` (from 0); every row is in exactly one batch."""
        if number != self._epoch:
            rng = np.random.default_rng([self.seed, number])
            order = rng.permutation(len(self.rows))
            arrange = pack if self.packing else group_by_length
            batches = arrange(self.rows.lengths, order, self.size)
            # Packing sorts rows by length; without this shuffle, steps would run from long rows to short ones.
            self._batches = [batches[i] for i in rng.permutation(len(batches))]
            self._epoch = number
        return self._batches

    def step(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Batch]]:
        """The batches of optimizer step `number` (from 0) that fall to `rank`, each with its place in the step.

        The last step of an epoch may have fewer batches than the others, or none for some ranks.
        """
        epoch, within = divmod(number, self.steps_per_epoch)
        batches = self.epoch(epoch)[within * self.per_step : (within + 1) * self.per_step]
        for place in range(rank, len(batches), world):
            yield place, self.build(batches[place])

    def build(self, indices: Sequence[int]) -> Batch:
        """The tensors of one batch."""
        rows = [self.rows[i] for i in indices]
        join = join_packed if self.packing else join_padded
        return join(rows, indices, self.pad_id)

    def whole(self, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every batch once, in a fixed order, those of `rank`: for evaluation."""
        for indices in self.epoch(0)[rank::world]:
            yield self.build(indices)


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


def join_packed(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Rows end to end in one sequence, positions restarting in each."""
    lengths = tuple(len(row.input_ids) for row in rows)
    labels = np.concatenate([_next_labels(row) for row in rows])
    predict = np.flatnonzero(labels != IGNORED)
    return Batch(
        input_ids=_tensor(np.concatenate([row.input_ids for row in rows]))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        lengths=lengths,
        predict=torch.from_numpy(predict),
        targets=_tensor(labels[predict]),
        rows=tuple(indices),
    )


def join_padded(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, padded on the right to the longest."""
    lengths = tuple(len(row.input_ids) for row in rows)
    longest = max(lengths)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for line, row in enumerate(rows):
        ids[line, : lengths[line]] = row.input_ids
        labels[line, : lengths[line]] = _next_labels(row)
    flat = labels.reshape(-1)
    predict = np.flatnonzero(flat != IGNORED)
    return Batch(
        input_ids=_tensor(ids),
        position_ids=torch.arange(longest).expand(len(rows), -1),
        attention_mask=torch.arange(longest) < torch.tensor(lengths)[:, None],
        lengths=lengths,
        predict=torch.from_numpy(predict),
        targets=_tensor(flat[predict]),
        rows=tuple(indices),
    )


def _next_labels(row: Row) -> NDArray[np.int32]:
    """Label of the following token at each position: position t predicts token t+1, the last one predicts nothing."""
    return np.append(row.labels[1:], np.int32(IGNORED))


def _tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
