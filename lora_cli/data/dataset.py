"""Encoded rows on disk as Arrow files, mapped into memory: a million rows cost no more than their index."""

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

IGNORE_INDEX = -100  # label of a token without loss, as everywhere in the field

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("runs", pa.list_(pa.int32())),  # start, stop, start, stop, ...: the tokens that carry loss
        ("values", pa.list_(pa.float64())),  # of other tasks: labels as the source numbers them, or target ids
        ("second", pa.int32()),  # last tokens that are the second text's, for models that tell the two apart
        ("supervised", pa.int32()),
        ("key", pa.uint64()),
        ("file", pa.int32()),
        ("line", pa.int64()),
    ]
)


class Row(NamedTuple):
    """One encoded row, as batches are made of."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[Any]  # causal-lm: int32, the id at its place where it carries loss, else -100; not shifted
    where: str  # `data/train.jsonl:17`
    pair_tokens: int = 0  # tokens at its end that belong to a second text


class RowWithSource(NamedTuple):
    """An encoded row and where it came from."""

    file: int
    line: int
    row: EncodedRow | LabeledRow
    values: LabelValues = NO_VALUES  # of a labelled row: its labels as the source numbers them, or its target ids


def to_record_batch(rows: Sequence[RowWithSource]) -> pa.RecordBatch:
    """The rows as one batch of the file."""
    columns = [
        _lists([placed.row.ids for placed in rows]),
        _lists([_runs(placed.row) for placed in rows]),
        _lists([placed.values for placed in rows], pa.float64()),
        pa.array([placed.row.pair_tokens if isinstance(placed.row, LabeledRow) else 0 for placed in rows], pa.int32()),
        pa.array([placed.row.supervised for placed in rows], pa.int32()),
        pa.array([placed.row.key for placed in rows], pa.uint64()),
        pa.array([placed.file for placed in rows], pa.int32()),
        pa.array([placed.line for placed in rows], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _runs(row: EncodedRow | LabeledRow) -> npt.NDArray[np.int32]:
    return np.array(row.supervised_spans if isinstance(row, EncodedRow) else (), dtype=np.int32).ravel()


def _lists(arrays: list[npt.NDArray[Any]], kind: pa.DataType | None = None) -> pa.Array:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), kind or pa.int32()))


class EncodedFile:
    """One file of encoded rows, mapped: its rows are read from disk when they are asked for."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._names = tuple(names)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_Batch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.keys) for batch in self._batches)])
        empty = np.zeros(0, np.int32)
        self.lengths = np.concatenate([empty, *(np.diff(batch.offsets) for batch in self._batches)])
        self.supervised = np.concatenate([empty, *(batch.supervised for batch in self._batches)])
        self.keys = np.concatenate([empty.astype(np.uint64), *(batch.keys for batch in self._batches)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].row(index - int(self._starts[number]), self._names)


class _Batch:
    """Views into one mapped record batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, runs = batch.column("ids"), batch.column("runs")
        self.offsets: npt.NDArray[np.int32] = ids.offsets.to_numpy()
        self._ids: npt.NDArray[np.int32] = ids.values.to_numpy()
        self._run_offsets: npt.NDArray[np.int32] = runs.offsets.to_numpy()
        self._runs: npt.NDArray[np.int32] = runs.values.to_numpy()
        values = batch.column("values")
        self._value_offsets: npt.NDArray[np.int32] = values.offsets.to_numpy()
        self._values: LabelValues = values.values.to_numpy()
        self._second: npt.NDArray[np.int32] = batch.column("second").to_numpy()
        self.supervised: npt.NDArray[np.int32] = batch.column("supervised").to_numpy()
        self.keys: npt.NDArray[np.uint64] = batch.column("key").to_numpy()
        self._files: npt.NDArray[np.int32] = batch.column("file").to_numpy()
        self._lines: npt.NDArray[np.int64] = batch.column("line").to_numpy()

    def row(self, index: int, names: Sequence[str]) -> Row:
        ids = self._ids[self.offsets[index] : self.offsets[index + 1]]
        where = f"{names[self._files[index]]}:{self._lines[index]}"
        values = self._values[self._value_offsets[index] : self._value_offsets[index + 1]]
        if len(values):
            return Row(ids, values, where, int(self._second[index]))
        labels = np.full_like(ids, IGNORE_INDEX)
        runs = self._runs[self._run_offsets[index] : self._run_offsets[index + 1]]
        for start, stop in runs.reshape(-1, 2):
            labels[start:stop] = ids[start:stop]
        return Row(ids, labels, where)


class EncodedDataset:
    """A split: rows of stored files in a fixed order, by file, then as they lie in it. Immutable."""

    def __init__(
        self, parts: Sequence[tuple[EncodedFile, npt.NDArray[np.int64]]], read: Sequence[Callable[[Row], Row]] = ()
    ) -> None:
        """`read`: for each part, what makes a row's labels of the numbers that its source has for them."""
        self._parts = [stored for stored, _ in parts]
        self._read = list(read)
        chosen = [index for _, index in parts]
        self._starts = np.cumsum([0, *(len(index) for index in chosen)])
        self._index = np.concatenate([np.zeros(0, np.int64), *chosen])
        empty = np.zeros(0, np.int32)
        self.lengths: npt.NDArray[np.int32] = np.concatenate([empty, *(s.lengths[i] for s, i in parts)])
        self.supervised: npt.NDArray[np.int32] = np.concatenate([empty, *(s.supervised[i] for s, i in parts)])
        self.keys: npt.NDArray[np.uint64] = np.concatenate([empty.astype(np.uint64), *(s.keys[i] for s, i in parts)])
        for array in (self._index, self.lengths, self.supervised, self.keys):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        row = self._parts[part][int(self._index[place])]
        return self._read[part](row) if self._read else row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and labels in their order: equal only for equal rows."""
        return hashlib.blake2b(self.keys.astype("<u8").tobytes(), digest_size=16).hexdigest()


def show_mask(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Every token of a row as text, and whether it carries loss; for `lora check` to colour."""
    pairs = zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
    return [(tokenizer.decode([token], skip_special_tokens=False), label != IGNORE_INDEX) for token, label in pairs]
