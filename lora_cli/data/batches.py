"""Batch sampler: assign rows to the batches of each optimizer step, with packing or padding, for each rank.

The plan is a pure function of (lengths, seed, epoch), identical on every process and after every restart, so the
position in the data follows from the number of the last step.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.collate import Batch, Collate, collate_packed, collate_padded
from lora_cli.data.encoded_rows import Row
from lora_cli.data.packing import group_by_length, pack


class RowSource(Protocol):
    """The interface of encoded rows that a plan needs."""

    lengths: NDArray[np.int32]  # [rows], in tokens

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class BatchPlan:
    """The batches of a training run, by optimizer step and process."""

    def __init__(
        self,
        rows: RowSource,
        *,
        packing: bool,
        size: int,
        batches_per_step: int,
        seed: int,
        pad_id: int = 0,
        collate: Collate | None = None,
        parts: int = 1,
    ) -> None:
        """Plan the batches of `rows`.

        Args:
            rows: encoded rows and their lengths.
            packing: concatenate several rows in a batch, instead of padding rows.
            size: tokens per batch with packing, rows per batch without.
            batches_per_step: batches of one optimizer step, of all processes together.
            seed: seed of the row order.
            pad_id: padding token id.
            collate: makes a batch from rows of the task; default: packed or padded causal-lm batches.
            parts: that a batch may be run in by the recipe, without want of memory.
        """
        self.rows = rows
        self._collate = collate or (collate_packed if packing else collate_padded)
        self.packing = packing
        self.size = size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.pad_id = pad_id
        self.parts = parts
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.batches_per_epoch = len(self.epoch(0))
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / batches_per_step)

    def steps_in(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Return the number of optimizer steps of a run: `max_steps`, or those of `epochs` if `max_steps` is None."""
        return max_steps or max(1, round((epochs or 1.0) * self.steps_per_epoch))

    def describe(self, total: int) -> str:
        """Return a line on the batches of a run of `total` optimizer steps."""
        return (
            f"{total:,} step{'s' * (total > 1)} of {self.batches_per_step} batch{'es' * (self.batches_per_step > 1)}, "
            f"{self.steps_per_epoch:,} per epoch; {self.token_share:.1%} of each batch is tokens"
        )

    @property
    def max_tokens(self) -> int:
        """Tokens in the largest batch, padding included."""
        lengths = self.rows.lengths
        if self.packing:
            return max(int(lengths[batch].sum()) for batch in self.epoch(0))
        return max(int(lengths[batch].max()) * len(batch) for batch in self.epoch(0))

    def tokens_of_part(self, parts: int) -> int:
        """Return the tokens that one of `parts` parts of a batch can have: `split` keeps rows whole."""
        if parts == 1:
            return self.max_tokens
        return min(self.max_tokens, self.max_tokens // parts + int(self.rows.lengths.max()))

    @property
    def token_share(self) -> float:
        """Share of real tokens in the positions of the batches; the rest is padding, or unused space with packing."""
        lengths, batches = self.rows.lengths, self.epoch(0)
        positions = [self.size if self.packing else int(lengths[batch].max()) * len(batch) for batch in batches]
        return float(lengths.sum(dtype=np.int64)) / sum(positions)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the row indices of each batch of epoch `number` (from 0); every row is in exactly one batch."""
        if number != self._epoch:
            rng = np.random.default_rng([self.seed, number])
            order = rng.permutation(len(self.rows))
            make_batches = pack if self.packing else group_by_length
            batches = make_batches(self.rows.lengths, order, self.size)
            # Batches are sorted from long to short rows, so they are shuffled.
            self._batches = [batches[i] for i in rng.permutation(len(batches))]
            self._epoch = number
        return self._batches

    def batches_of_step(self, number: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Batch]]:
        """Yield the batches of optimizer step `number` (from 0) for `rank`, each with its position in the step.

        The last step of an epoch may have fewer batches than the others, or none for some ranks.
        """
        epoch, within = divmod(number, self.steps_per_epoch)
        batches = self.epoch(epoch)[within * self.batches_per_step : (within + 1) * self.batches_per_step]
        for position in range(rank, len(batches), world_size):
            yield position, self.make_batch(batches[position])

    def make_batch(self, indices: Sequence[int]) -> Batch:
        """Return the tensors of one batch of the rows `indices`; `Batch` gives shapes and dtypes."""
        return self._collate([self.rows[i] for i in indices], indices, self.pad_id)

    def largest_batch(self) -> Batch:
        """Return the batch with the most tokens, padding included."""
        lengths = self.rows.lengths
        size = (lambda b: int(lengths[b].sum())) if self.packing else (lambda b: int(lengths[b].max()) * len(b))
        return self.make_batch(max(self.epoch(0), key=size))

    @property
    def max_rows(self) -> int:
        """Rows of the batch that has the most."""
        return max(map(len, self.epoch(0)))

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """Return the rows of `batch` as at most `parts` batches of about as many tokens each, in the same order."""
        if parts == 1 or len(batch.rows) == 1:
            return [batch]
        if parts >= len(batch.rows):
            return [self.make_batch([row]) for row in batch.rows]
        rows = np.array(batch.rows)
        ends = self.rows.lengths[rows].cumsum(dtype=np.int64)
        middles = ends - self.rows.lengths[rows] / 2
        numbers = np.minimum(middles * parts // ends[-1], parts - 1)
        return [self.make_batch(rows[numbers == number].tolist()) for number in np.unique(numbers)]

    def all_batches(self, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield every batch of `rank` once, in a fixed order, for evaluation."""
        for indices in self.epoch(0)[rank::world_size]:
            yield self.make_batch(indices)
