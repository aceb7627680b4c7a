"""Which rows meet in which batch of which step: best-fit packing or padding, from lengths and a seed alone.

The plan is a pure function of (lengths, seed, epoch), the same on every process and after every restart, so the
position in the data is nothing but the number of the last step.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.rows import IGNORED, Row

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


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
    predict: Tensor  # int64 [n]: places in the flattened outputs that have a label; of causal-lm, before its token
    targets: Tensor  # [n]: those labels: int64 token ids or classes; float32 [n, labels] of several or of values
    rows: tuple[int, ...]  # indices into the row source
    extra: Mapping[str, Tensor] = NOTHING  # further arguments of the model's forward, each [rows, L]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)


# Makes a batch of rows, given their indices and the id to pad with.
Join = Callable[[Sequence[Row], Sequence[int], int], Batch]


class Plan:
    """The batches of a whole training run, step by step, for one process out of `world`."""

    def __init__(
        self,
        rows: RowSource,
        *,
        packing: bool,
        size: int,
        per_step: int,
        seed: int,
        pad_id: int = 0,
        join: Join | None = None,
    ) -> None:
        """`size` is tokens a batch with packing, rows a batch without; `per_step` counts batches of all processes.

        `join` makes a batch of a task's rows; by default one of causal-lm, packed or padded.
        """
        self.rows = rows
        self._join = join or (join_packed if packing else join_padded)
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
        return self._join([self.rows[i] for i in indices], indices, self.pad_id)

    def whole(self, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every batch once, in a fixed order, those of `rank`: for evaluation."""
        for indices in self.epoch(0)[rank::world]:
            yield self.build(indices)


def rows_of_units(batch: Batch) -> NDArray[np.int64]:
    """Which row of the batch, counted from 0, each of its tokens or words belongs to."""
    places = batch.predict.numpy()
    if batch.attention_mask is None:  # packed
        return np.searchsorted(np.cumsum(batch.lengths), places, side="right")
    found: NDArray[np.int64] = places // batch.extra.get("decoder_input_ids", batch.input_ids).shape[1]
    return found


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
    labels = _padded([_next_labels(row) for row in rows], IGNORED).reshape(-1)
    predict = np.flatnonzero(labels != IGNORED)
    return _lines(rows, indices, pad_id)._replace(
        predict=torch.from_numpy(predict),
        targets=_tensor(labels[predict]),
    )


def join_classified(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, with a label, several, or numbers to come near to."""
    labels = torch.from_numpy(np.stack([row.labels for row in rows]))
    single = labels.dtype == torch.int32
    return _lines(rows, indices, pad_id)._replace(
        predict=torch.arange(len(rows)), targets=labels[:, 0].long() if single else labels
    )


def join_tagged(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, with a label at the first token of each word."""
    labels = _padded([row.labels for row in rows], IGNORED).reshape(-1)
    predict = np.flatnonzero(labels != IGNORED)
    return _lines(rows, indices, pad_id)._replace(predict=torch.from_numpy(predict), targets=_tensor(labels[predict]))


def join_translated(rows: Sequence[Row], indices: Sequence[int], pad_id: int, *, start_id: int) -> Batch:
    """One text a line for the encoder; the decoder reads `start_id` and the target but for its last token."""
    targets = [row.labels.astype(np.int64) for row in rows]
    labels = _padded(targets, IGNORED).reshape(-1)
    read = _padded([np.concatenate([[start_id], target[:-1]]) for target in targets], pad_id)
    sizes = torch.tensor([len(target) for target in targets])
    predict = np.flatnonzero(labels != IGNORED)
    return _lines(rows, indices, pad_id)._replace(
        predict=torch.from_numpy(predict),
        targets=_tensor(labels[predict]),
        extra={
            "decoder_input_ids": _tensor(read),
            "decoder_attention_mask": (torch.arange(read.shape[1]) < sizes[:, None]).long(),
        },
    )


def _lines(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, padded on the right to the longest; without labels yet."""
    lengths = tuple(len(row.input_ids) for row in rows)
    longest = max(lengths)
    places = torch.arange(longest)
    mask = places < torch.tensor(lengths)[:, None]
    extra = NOTHING
    if any(row.second for row in rows):
        starts = torch.tensor([length - row.second for length, row in zip(lengths, rows, strict=True)])
        extra = {"token_type_ids": ((places >= starts[:, None]) & mask).long()}
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=_tensor(_padded([row.input_ids for row in rows], pad_id)),
        position_ids=places.expand(len(rows), -1),
        attention_mask=mask,
        lengths=lengths,
        predict=none,
        targets=none,
        rows=tuple(indices),
        extra=extra,
    )


def _padded(arrays: Sequence[NDArray[np.integer]], fill: int) -> NDArray[np.int64]:
    lines = np.full((len(arrays), max(map(len, arrays))), fill, dtype=np.int64)
    for line, array in zip(lines, arrays, strict=True):
        line[: len(array)] = array
    return lines


def _next_labels(row: Row) -> NDArray[np.int32]:
    """Label of the following token at each position: position t predicts token t+1, the last one predicts nothing."""
    return np.append(row.labels[1:], np.int32(IGNORED))


def _tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
