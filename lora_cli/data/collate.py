"""Collate encoded rows into batch tensors: packed end to end, or padded on the right, for each task."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.dataset import IGNORE_INDEX, Row

NO_EXTRA: Mapping[str, Tensor] = MappingProxyType({})


class Batch(NamedTuple):
    """One device batch, and the positions in it that predict a supervised token."""

    input_ids: Tensor  # int64 [1, T] packed, [rows, L] padded
    position_ids: Tensor  # int64, like input_ids; restarts at 0 in each row
    attention_mask: Tensor | None  # bool like input_ids, True on tokens; None where packed
    lengths: tuple[int, ...]  # tokens of each row, in order
    label_positions: (
        Tensor  # int64 [n]: places in the flattened outputs that have a label; of causal-lm, before its token
    )
    targets: Tensor  # [n]: those labels: int64 token ids or classes; float32 [n, labels] of several or of values
    rows: tuple[int, ...]  # indices into the row source
    extra: Mapping[str, Tensor] = NO_EXTRA  # further arguments of the model's forward, each [rows, L]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)


# Makes a batch of rows, given their indices and the id to pad with.
Collate = Callable[[Sequence[Row], Sequence[int], int], Batch]


def rows_of_labels(batch: Batch) -> NDArray[np.int64]:
    """Which row of the batch, counted from 0, each of its tokens or words belongs to."""
    places = batch.label_positions.numpy()
    if batch.attention_mask is None:  # packed
        return np.searchsorted(np.cumsum(batch.lengths), places, side="right")
    found: NDArray[np.int64] = places // batch.extra.get("decoder_input_ids", batch.input_ids).shape[1]
    return found


def collate_packed(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Rows end to end in one sequence, positions restarting in each."""
    lengths = tuple(len(row.input_ids) for row in rows)
    labels = np.concatenate([_shift_labels(row) for row in rows])
    predict = np.flatnonzero(labels != IGNORE_INDEX)
    return Batch(
        input_ids=_to_tensor(np.concatenate([row.input_ids for row in rows]))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        lengths=lengths,
        label_positions=torch.from_numpy(predict),
        targets=_to_tensor(labels[predict]),
        rows=tuple(indices),
    )


def collate_padded(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, padded on the right to the longest."""
    labels = _pad([_shift_labels(row) for row in rows], IGNORE_INDEX).reshape(-1)
    predict = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(predict),
        targets=_to_tensor(labels[predict]),
    )


def collate_classified(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, with a label, several, or numbers to come near to."""
    labels = torch.from_numpy(np.stack([row.labels for row in rows]))
    single = labels.dtype == torch.int32
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.arange(len(rows)), targets=labels[:, 0].long() if single else labels
    )


def collate_tagged(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, with a label at the first token of each word."""
    labels = _pad([row.labels for row in rows], IGNORE_INDEX).reshape(-1)
    predict = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(predict), targets=_to_tensor(labels[predict])
    )


def collate_translated(rows: Sequence[Row], indices: Sequence[int], pad_id: int, *, start_id: int) -> Batch:
    """One text a line for the encoder; the decoder reads `start_id` and the target but for its last token."""
    targets = [row.labels.astype(np.int64) for row in rows]
    labels = _pad(targets, IGNORE_INDEX).reshape(-1)
    read = _pad([np.concatenate([[start_id], target[:-1]]) for target in targets], pad_id)
    sizes = torch.tensor([len(target) for target in targets])
    predict = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(predict),
        targets=_to_tensor(labels[predict]),
        extra={
            "decoder_input_ids": _to_tensor(read),
            "decoder_attention_mask": (torch.arange(read.shape[1]) < sizes[:, None]).long(),
        },
    )


def _pad_rows(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """One row a line, padded on the right to the longest; without labels yet."""
    lengths = tuple(len(row.input_ids) for row in rows)
    longest = max(lengths)
    places = torch.arange(longest)
    mask = places < torch.tensor(lengths)[:, None]
    extra = NO_EXTRA
    if any(row.pair_tokens for row in rows):
        starts = torch.tensor([length - row.pair_tokens for length, row in zip(lengths, rows, strict=True)])
        extra = {"token_type_ids": ((places >= starts[:, None]) & mask).long()}
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=_to_tensor(_pad([row.input_ids for row in rows], pad_id)),
        position_ids=places.expand(len(rows), -1),
        attention_mask=mask,
        lengths=lengths,
        label_positions=none,
        targets=none,
        rows=tuple(indices),
        extra=extra,
    )


def _pad(arrays: Sequence[NDArray[np.integer]], fill: int) -> NDArray[np.int64]:
    lines = np.full((len(arrays), max(map(len, arrays))), fill, dtype=np.int64)
    for line, array in zip(lines, arrays, strict=True):
        line[: len(array)] = array
    return lines


def _shift_labels(row: Row) -> NDArray[np.int32]:
    """Label of the following token at each position: position t predicts token t+1, the last one predicts nothing."""
    return np.append(row.labels[1:], np.int32(IGNORE_INDEX))


def _to_tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
