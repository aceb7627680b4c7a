"""Which rows meet in which batch of which step: best-fit packing or padding, from lengths and a seed alone.

The plan is a pure function of (lengths, seed, epoch), the same on every process and after every restart, so the
position in the data is nothing but the number of the last step.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.collate import Batch, Collate, collate_packed, collate_padded
from lora_cli.data.dataset import Row
from lora_cli.data.packing import group_by_length, pack


class RowSource(Protocol):
    """What a plan needs of encoded rows."""

    lengths: NDArray[np.int32]

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class BatchPlan:
    """The batches of a whole training run, step by step, for one process out of `world`."""

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
    ) -> None:
        """Plan the batches of `rows`.

        Args:
            rows: with their lengths.
            packing: several rows end to end in a batch, or one row a line.
            size: tokens a batch with packing, rows a batch without.
            batches_per_step: of all processes together.
            seed: of the row order.
            pad_id: token id to pad with.
            collate: makes a batch of a task's rows; by default one of causal-lm, packed or padded.
        """
        self.rows = rows
        self._collate = collate or (collate_packed if packing else collate_padded)
        self.packing = packing
        self.size = size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.pad_id = pad_id
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.batches_per_epoch = len(self.epoch(0))
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / batches_per_step)

    def steps_in(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Optimizer steps of a run, of which one of the two says the length."""
        return max_steps or max(1, round((epochs or 1.0) * self.steps_per_epoch))

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        lengths = self.rows.lengths
        if self.packing:
            return max(int(lengths[batch].sum()) for batch in self.epoch(0))
        return max(int(lengths[batch].max()) * len(batch) for batch in self.epoch(0))

    @property
    def token_share(self) -> float:
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
        batches = self.epoch(epoch)[within * self.batches_per_step : (within + 1) * self.batches_per_step]
        for place in range(rank, len(batches), world):
            yield place, self.make_batch(batches[place])

    def make_batch(self, indices: Sequence[int]) -> Batch:
        """The tensors of one batch."""
        return self._collate([self.rows[i] for i in indices], indices, self.pad_id)

    def all_batches(self, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every batch once, in a fixed order, those of `rank`: for evaluation."""
        for indices in self.epoch(0)[rank::world]:
            yield self.make_batch(indices)
