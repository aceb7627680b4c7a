"""Dataset of encoded rows (input_ids, labels) in memory-mapped Arrow files; only an index is in memory. No models."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lora_cli.data.encode import EncodedRow
from lora_cli.data.encode_classes import NO_VALUES, LabeledRow, LabelValues
from lora_cli.data.label_mask import IGNORE_INDEX, labels_of_spans
from lora_cli.data.token_text import token_texts

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("runs", pa.list_(pa.int32())),  # start, stop, start, stop, ...: spans of tokens that carry loss
        ("values", pa.list_(pa.float64())),  # other tasks than causal-lm: label numbers of the source, or target ids
        ("second", pa.int32()),  # number of tokens at the end that belong to a second text (token_type_ids 1)
        ("supervised", pa.int32()),
        ("key", pa.uint64()),
        ("file", pa.int32()),
        ("line", pa.int64()),
    ]
)


class Row(NamedTuple):
    """One encoded row."""

    input_ids: npt.NDArray[np.int32]  # [tokens]
    # causal-lm: int32 [tokens], the token's id if it carries loss, else -100, not shifted; seq2seq-lm: float64 target
    # ids [target tokens]; other tasks: see `label_mapper`.
    labels: npt.NDArray[Any]
    where: str  # location of the raw row: `data/train.jsonl:17`
    pair_tokens: int = 0  # tokens at its end that belong to a second text


class RowWithSource(NamedTuple):
    """An encoded row and the location of the raw row."""

    file: int  # index into the source's names
    line: int  # 1-based
    row: EncodedRow | LabeledRow
    values: LabelValues = NO_VALUES  # for a LabeledRow: float64, its label numbers of the source, or its target ids


def to_record_batch(rows: Sequence[RowWithSource]) -> pa.RecordBatch:
    """Return the rows as one Arrow record batch with the columns of SCHEMA."""
    columns = [
        _list_array([item.row.ids for item in rows]),
        _list_array([_flat_spans(item.row) for item in rows]),
        _list_array([item.values for item in rows], pa.float64()),
        pa.array([item.row.pair_tokens if isinstance(item.row, LabeledRow) else 0 for item in rows], pa.int32()),
        pa.array([item.row.supervised for item in rows], pa.int32()),
        pa.array([item.row.key for item in rows], pa.uint64()),
        pa.array([item.file for item in rows], pa.int32()),
        pa.array([item.line for item in rows], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _flat_spans(row: EncodedRow | LabeledRow) -> npt.NDArray[np.int32]:
    return np.array(row.supervised_spans if isinstance(row, EncodedRow) else (), dtype=np.int32).ravel()


def _list_array(arrays: list[npt.NDArray[Any]], value_type: pa.DataType | None = None) -> pa.Array:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), value_type or pa.int32()))


class EncodedRows:
    """Memory-mapped Arrow files of the encoded rows of a source: a row is read from disk when it is accessed.

    Attributes:
        lengths: int32 [rows], tokens of each row.
        supervised: int32 [rows], tokens or labels of each row that carry loss.
        keys: uint64 [rows], a hash of each row's ids and labels.
    """

    def __init__(self, parts: Sequence[Path], names: Sequence[str]) -> None:
        """`parts` are the files in the order of the rows, `names` the names of the source's files."""
        self._names = tuple(names)
        readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in parts]
        self._batches = [_RecordBatch(each.get_batch(i)) for each in readers for i in range(each.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.keys) for batch in self._batches)])
        empty = np.zeros(0, np.int32)
        self.lengths = np.concatenate([empty, *(np.diff(batch.offsets) for batch in self._batches)])
        self.supervised = np.concatenate([empty, *(batch.supervised for batch in self._batches)])
        self.keys = np.concatenate([empty.astype(np.uint64), *(batch.keys for batch in self._batches)])

    def __len__(self) -> int:
        return len(self.lengths)

    def document_keys(self) -> npt.NDArray[np.uint64]:
        """Return for each row the key of the first row from the same line, uint64 [rows]: a document can be several."""
        places = [np.stack([batch.files, batch.lines], axis=1) for batch in self._batches]
        changes = np.diff(np.concatenate(places), axis=0).any(axis=1) if places else np.zeros(0, bool)
        first = np.concatenate([np.ones(min(len(self), 1), bool), changes])
        return self.keys[np.maximum.accumulate(np.where(first, np.arange(len(self)), 0))]

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].row(index - int(self._starts[number]), self._names)


class _RecordBatch:
    """Views of one memory-mapped record batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, spans = batch.column("ids"), batch.column("runs")
        self.offsets: npt.NDArray[np.int32] = ids.offsets.to_numpy()
        self._ids: npt.NDArray[np.int32] = ids.values.to_numpy()
        self._span_offsets: npt.NDArray[np.int32] = spans.offsets.to_numpy()
        self._spans: npt.NDArray[np.int32] = spans.values.to_numpy()
        values = batch.column("values")
        self._value_offsets: npt.NDArray[np.int32] = values.offsets.to_numpy()
        self._values: LabelValues = values.values.to_numpy()
        self._pair_tokens: npt.NDArray[np.int32] = batch.column("second").to_numpy()
        self.supervised: npt.NDArray[np.int32] = batch.column("supervised").to_numpy()
        self.keys: npt.NDArray[np.uint64] = batch.column("key").to_numpy()
        self.files: npt.NDArray[np.int32] = batch.column("file").to_numpy()
        self.lines: npt.NDArray[np.int64] = batch.column("line").to_numpy()

    def row(self, index: int, names: Sequence[str]) -> Row:
        ids = self._ids[self.offsets[index] : self.offsets[index + 1]]
        where = f"{names[self.files[index]]}:{self.lines[index]}"
        values = self._values[self._value_offsets[index] : self._value_offsets[index + 1]]
        if len(values):
            return Row(ids, values, where, int(self._pair_tokens[index]))
        spans = self._spans[self._span_offsets[index] : self._span_offsets[index + 1]]
        return Row(ids, labels_of_spans(ids, spans.reshape(-1, 2)), where)


class EncodedDataset:
    """The train or eval split: selected rows of encoded files in a fixed order, file by file. Immutable.

    `lengths` (int32), `supervised` (int32) and `keys` (uint64) are [rows], as in `EncodedRows`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[EncodedRows, npt.NDArray[np.int64]]],
        label_mappers: Sequence[Callable[[Row], Row]] = (),
    ) -> None:
        """Select rows of encoded files.

        Args:
            parts: files, each with the int64 [rows] indices of its selected rows.
            label_mappers: for each part, a function that replaces label numbers of the source by those of the run.
        """
        self._parts = [file for file, _ in parts]
        self._label_mappers = list(label_mappers)
        selected = [index for _, index in parts]
        self._starts = np.cumsum([0, *(len(index) for index in selected)])
        self._index = np.concatenate([np.zeros(0, np.int64), *selected])
        empty = np.zeros(0, np.int32)
        self.lengths: npt.NDArray[np.int32] = np.concatenate([empty, *(file.lengths[i] for file, i in parts)])
        self.supervised: npt.NDArray[np.int32] = np.concatenate([empty, *(file.supervised[i] for file, i in parts)])
        self.keys: npt.NDArray[np.uint64] = np.concatenate(
            [empty.astype(np.uint64), *(file.keys[i] for file, i in parts)]
        )
        for array in (self._index, self.lengths, self.supervised, self.keys):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        row = self._parts[part][int(self._index[position])]
        return self._label_mappers[part](row) if self._label_mappers else row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and labels in order."""
        return hashlib.blake2b(self.keys.astype("<u8").tobytes(), digest_size=16).hexdigest()


def show_mask(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return every token of a row as text with whether it carries loss (the label mask), for `lora check` to color."""
    texts = token_texts(row.input_ids.tolist(), tokenizer)
    return [(text, label != IGNORE_INDEX) for text, label in zip(texts, row.labels.tolist(), strict=True)]
