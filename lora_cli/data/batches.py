"""Batch sampler: assign rows to the batches of each optimizer step, with packing or padding, for each rank.

The plan is a pure function of (lengths, seed, epoch), identical on every process and after every restart, so the
position in the data follows from the number of the last step.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.collate import Batch, Collate, collate_packed, collate_padded
from lora_cli.data.divide import PlannedBatch, balance, divide, evenness
from lora_cli.data.encoded_rows import Row
from lora_cli.data.packing import group_by_length, pack

STEPS_MEASURED = 64  # steps from which the share of each process is estimated
WAITING = 0.1  # share of a step that processes wait for each other, from which it is told what to do


class RowSource(Protocol):
    """The interface of encoded rows that a plan needs."""

    lengths: NDArray[np.int32]  # [rows], in tokens

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class _Largest(NamedTuple):
    """The extremes among the batches of an epoch, as devices run them."""

    tokens: int  # of the batch with the most, padding included
    rows: list[int]  # of that batch
    most_rows: int  # of the batch that has the most


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
        join: bool = False,
        processes: int = 1,
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
            join: run the batches of a step on a device as one, as far as its memory allows.
            processes: among which the batches of a step are divided.
        """
        self.rows = rows
        self._collate = collate or (collate_packed if packing else collate_padded)
        self.packing = packing
        self.size = size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.pad_id = pad_id
        self.join = join
        self.processes = processes
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.batches_per_epoch = len(self.epoch(0))
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / batches_per_step)

    @property
    def batches_of_device(self) -> int:
        """Batches of a step on one device, before they are joined."""
        return max(1, self.batches_per_step // self.processes)

    @property
    def parts(self) -> int:
        """Parts in which a batch of a device is run by the recipe, without want of memory."""
        return self.batches_of_device if self.join else 1

    def steps_in(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Return the number of optimizer steps of a run: `max_steps`, or those of `epochs` if `max_steps` is None."""
        return max_steps or max(1, round((epochs or 1.0) * self.steps_per_epoch))

    def describe(self, total: int) -> list[str]:
        """Return lines on the batches of a run of `total` optimizer steps, and on their division among processes."""
        size = f"{self.batches_per_step} batch{'es' * (self.batches_per_step > 1)}"
        if self.join:
            size = f"up to {self.batches_per_step * self.size:,} tokens"
        lines = [
            f"{total:,} step{'s' * (total > 1)} of {size}, "
            f"{self.steps_per_epoch:,} per epoch; {self.token_share:.1%} of each batch is tokens"
        ]
        if self.processes > 1:
            steps = range(min(self.steps_per_epoch, STEPS_MEASURED))
            busy = [evenness(self.shares_of_step(step), self.rows.lengths) for step in steps]
            share = sum(busy) / len(busy)
            lines.append(
                f"each step is divided among {self.processes} processes, which compute {share:.1%} of the time"
            )
            if share < 1 - WAITING:
                lines.append("  a step has too few rows to divide them evenly: more tokens or rows per step waste less")
        return lines

    @property
    def max_tokens(self) -> int:
        """Tokens in the largest batch of a device, padding included."""
        return self._largest.tokens

    @cached_property
    def _largest(self) -> _Largest:
        """The largest batch of a device in an epoch. Found once: an epoch can have a hundred thousand batches."""
        lengths = self.rows.lengths.tolist()  # a list: NumPy takes microseconds for the few rows of a batch
        largest = _Largest(tokens=0, rows=[], most_rows=0)
        for step in range(self.steps_per_epoch):
            for batch in chain.from_iterable(self.shares_of_step(step)):
                of_rows = [lengths[row] for row in batch.rows]
                tokens = sum(of_rows) if self.packing else max(of_rows) * len(of_rows)
                if tokens > largest.tokens:
                    largest = largest._replace(tokens=tokens, rows=batch.rows)
                largest = largest._replace(most_rows=max(largest.most_rows, len(of_rows)))
        return largest

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

    def shares_of_step(self, number: int) -> list[list[PlannedBatch]]:
        """Return the batches of optimizer step `number` (from 0) for each process.

        The last step of an epoch may have fewer rows than the others, and with padding none for some processes.
        """
        epoch, within = divmod(number, self.steps_per_epoch)
        batches = self.epoch(epoch)[within * self.batches_per_step : (within + 1) * self.batches_per_step]
        lengths, size, packing = self.rows.lengths, self.size, self.packing
        if packing:
            batches = balance(batches, lengths, count=self.batches_per_step, size=size)
        shares = divide(batches, lengths, processes=self.processes, size=size, packing=packing)
        if not self.join:
            return shares
        joined = [[row for batch in share for row in batch.rows] for share in shares]
        return [[PlannedBatch(rank, rows)] if rows else [] for rank, rows in enumerate(joined)]

    def batches_of_step(self, number: int, *, rank: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield the batches of optimizer step `number` (from 0) for `rank`, each with its position in the step."""
        for position, rows in self.shares_of_step(number)[rank]:
            yield position, self.make_batch(rows)

    def make_batch(self, indices: Sequence[int]) -> Batch:
        """Return the tensors of one batch of the rows `indices`; `Batch` gives shapes and dtypes."""
        return self._collate([self.rows[i] for i in indices], indices, self.pad_id)

    def largest_batch(self) -> Batch:
        """Return the batch of a device with the most tokens, padding included."""
        return self.make_batch(self._largest.rows)

    @property
    def max_rows(self) -> int:
        """Rows of the batch that has the most."""
        return self._largest.most_rows

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
