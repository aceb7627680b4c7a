"""Data collators: make batch tensors from encoded rows, packed end to end or padded on the right, for each task."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX

NO_EXTRA: Mapping[str, Tensor] = MappingProxyType({})


class Batch(NamedTuple):
    """One device batch, with its labels and the positions that predict them."""

    input_ids: Tensor  # int64 [1, T] packed, [rows, L] padded
    position_ids: Tensor  # int64, like input_ids; restarts at 0 in each row
    attention_mask: Tensor | None  # bool like input_ids, True on tokens; None where packed
    lengths: tuple[int, ...]  # tokens of each row, in order
    label_positions: Tensor  # int64 [n]: indices of flattened outputs with a label; in causal-lm, one before its token
    targets: Tensor  # their labels: int64 [n] token ids or classes; float32 [n, labels] for multi-label, regression
    rows: tuple[int, ...]  # indices into the row source
    extra: Mapping[str, Tensor] = (
        NO_EXTRA  # other arguments of the model's forward, int64 [rows, L] or, for the decoder, [rows, M]
    )

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)


# Makes a batch from rows, their indices in the row source, and the padding token id.
Collate = Callable[[Sequence[Row], Sequence[int], int], Batch]


def rows_of_labels(batch: Batch) -> NDArray[np.int64]:
    """Return the index in the batch of the row that each label belongs to, int64 [n]."""
    positions = batch.label_positions.numpy()
    if batch.attention_mask is None:  # packed
        return np.searchsorted(np.cumsum(batch.lengths), positions, side="right")
    rows: NDArray[np.int64] = positions // batch.extra.get("decoder_input_ids", batch.input_ids).shape[1]
    return rows


def collate_packed(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Concatenate causal-lm rows to one sequence [1, T], with positions that restart at 0 in each row."""
    lengths = tuple(len(row.input_ids) for row in rows)
    labels = np.concatenate([_shift_labels(row) for row in rows])
    label_positions = np.flatnonzero(labels != IGNORE_INDEX)
    return Batch(
        input_ids=_to_tensor(np.concatenate([row.input_ids for row in rows]))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        lengths=lengths,
        label_positions=torch.from_numpy(label_positions),
        targets=_to_tensor(labels[label_positions]),
        rows=tuple(indices),
    )


def collate_padded(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Pad causal-lm rows on the right to the longest, [rows, L]."""
    labels = _pad([_shift_labels(row) for row in rows], IGNORE_INDEX).reshape(-1)
    label_positions = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(label_positions),
        targets=_to_tensor(labels[label_positions]),
    )


def collate_sequence_classification(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Pad seq-cls rows, [rows, L]; each row has a class, several classes, or regression values as target."""
    labels = torch.from_numpy(np.stack([row.labels for row in rows]))
    single = labels.dtype == torch.int32
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.arange(len(rows)), targets=labels[:, 0].long() if single else labels
    )


def collate_token_classification(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Pad token-cls rows, [rows, L]; the first token of each word has a class as target."""
    labels = _pad([row.labels for row in rows], IGNORE_INDEX).reshape(-1)
    label_positions = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(label_positions), targets=_to_tensor(labels[label_positions])
    )


def collate_seq2seq(rows: Sequence[Row], indices: Sequence[int], pad_id: int, *, start_id: int) -> Batch:
    """Pad seq2seq-lm rows: encoder input [rows, L], decoder input [rows, M] of `start_id` and the shifted target."""
    targets = [row.labels.astype(np.int64) for row in rows]
    labels = _pad(targets, IGNORE_INDEX).reshape(-1)
    decoder_input = _pad([np.concatenate([[start_id], target[:-1]]) for target in targets], pad_id)
    sizes = torch.tensor([len(target) for target in targets])
    label_positions = np.flatnonzero(labels != IGNORE_INDEX)
    return _pad_rows(rows, indices, pad_id)._replace(
        label_positions=torch.from_numpy(label_positions),
        targets=_to_tensor(labels[label_positions]),
        extra={
            "decoder_input_ids": _to_tensor(decoder_input),
            "decoder_attention_mask": (torch.arange(decoder_input.shape[1]) < sizes[:, None]).long(),
        },
    )


def _pad_rows(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> Batch:
    """Pad rows on the right to the longest, [rows, L], without labels."""
    lengths = tuple(len(row.input_ids) for row in rows)
    longest = max(lengths)
    positions = torch.arange(longest)
    mask = positions < torch.tensor(lengths)[:, None]
    extra = NO_EXTRA
    if any(row.pair_tokens for row in rows):
        starts = torch.tensor([length - row.pair_tokens for length, row in zip(lengths, rows, strict=True)])
        extra = {"token_type_ids": ((positions >= starts[:, None]) & mask).long()}
    no_labels = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=_to_tensor(_pad([row.input_ids for row in rows], pad_id)),
        position_ids=positions.repeat(len(rows), 1),  # no view: rows that share memory cannot be pinned
        attention_mask=mask,
        lengths=lengths,
        label_positions=no_labels,
        targets=no_labels,
        rows=tuple(indices),
        extra=extra,
    )


def _pad(arrays: Sequence[NDArray[np.integer]], fill: int) -> NDArray[np.int64]:
    padded = np.full((len(arrays), max(map(len, arrays))), fill, dtype=np.int64)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded


def _shift_labels(row: Row) -> NDArray[np.int32]:
    """Return the label of the next token at each position; the last position predicts nothing."""
    return np.append(row.labels[1:], np.int32(IGNORE_INDEX))


def _to_tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
