"""Encoded rows (input_ids, labels) in Arrow files: written in batches, read row by row at byte offsets. No models.

The files are not memory-mapped: the kernel ends a process (SIGBUS) whose mapped file another program cuts off. They
stay open, so that a run goes on when its cache is removed, and each row is compared with its checksum when it is read.
"""

import os
import resource
import struct
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from lora_cli.data.encode import EncodedRow
from lora_cli.data.encode_classes import NO_VALUES, LabeledRow, LabelValues
from lora_cli.data.label_mask import labels_of_spans
from lora_cli.errors import LoraError

# The small values of a row, which are read at once, in the machine's byte order: start and stop of its items in the
# columns ids, runs and values; tokens at its end that belong to a second text (token_type_ids 1); index of its file;
# line; checksum (see `_row_checksum`).
HEAD = struct.Struct("=8iqQ")
HEAD_DTYPE = np.dtype([("lists", "i4", (3, 2)), ("pair_tokens", "i4"), ("file", "i4"), ("line", "i8"), ("check", "u8")])
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("runs", pa.list_(pa.int32())),  # start, stop, start, stop, ...: spans of tokens that carry loss
        ("values", pa.list_(pa.float64())),  # other tasks than causal-lm: label numbers of the source, or target ids
        ("supervised", pa.int32()),
        ("key", pa.uint64()),
        ("head", pa.binary(HEAD.size)),
    ]
)
SPARE_FILES = 256  # open files that the limit of the process must leave for everything else


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
    ids, spans, values = zip(*((item.row.ids, _flat_spans(item.row), item.values) for item in rows), strict=True)
    lists: tuple[tuple[npt.NDArray[Any], ...], ...] = (ids, spans, values)
    offsets = [np.cumsum([0, *map(len, column)], dtype=np.int32) for column in lists]
    heads = np.zeros(len(rows), HEAD_DTYPE)
    heads["lists"] = np.stack([np.stack([ends[:-1], ends[1:]], axis=1) for ends in offsets], axis=1)
    heads["pair_tokens"] = [item.row.pair_tokens if isinstance(item.row, LabeledRow) else 0 for item in rows]
    heads["file"], heads["line"] = [item.file for item in rows], [item.line for item in rows]
    keys = [item.row.key for item in rows]
    heads["check"] = [
        _row_checksum([part.tobytes() for part in parts], head[1:4], key=key)
        for parts, head, key in zip(zip(*lists, strict=True), heads.tolist(), keys, strict=True)
    ]
    columns = [
        _list_array(lists[0], offsets[0], np.int32),
        _list_array(lists[1], offsets[1], np.int32),
        _list_array(lists[2], offsets[2], np.float64),
        _array(np.array([item.row.supervised for item in rows], np.int32)),
        _array(np.array(keys, np.uint64)),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(HEAD.size), len(rows), [None, pa.py_buffer(heads.tobytes())]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _flat_spans(row: EncodedRow | LabeledRow) -> npt.NDArray[np.int32]:
    return np.array(row.supervised_spans if isinstance(row, EncodedRow) else (), dtype=np.int32).ravel()


def _list_array(arrays: Sequence[npt.NDArray[Any]], offsets: npt.NDArray[np.int32], dtype: npt.DTypeLike) -> pa.Array:
    return pa.ListArray.from_arrays(_array(offsets), _array(np.concatenate(arrays).astype(dtype, copy=False)))


def _array(values: npt.NDArray[Any]) -> pa.Array:
    """Return an Arrow array of numbers. `pa.array` would import pandas, which takes a third of a second."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _row_checksum(lists: Sequence[bytes], numbers: Sequence[int], *, key: int) -> int:
    """Return the xxh3 (64 bits) of what a row is made from, in the machine's byte order.

    Args:
        lists: ids, runs and values.
        numbers: pair_tokens, file and line.
        key: of the row. It is in memory while rows are read, so that another row with its own checksum is wrong too.
    """
    return xxhash.xxh3_64_intdigest(b"".join(lists) + struct.pack("=6q", *map(len, lists), *numbers), seed=key)


class EncodedRows:
    """The encoded rows of a source. In memory are 16 bytes for each; the rest is read when a row is accessed.

    Attributes:
        lengths: int32 [rows], tokens of each row.
        supervised: int32 [rows], tokens or labels of each row that carry loss.
        keys: uint64 [rows], a hash of each row's ids and labels.
    """

    def __init__(self, parts: Sequence[Path], names: Sequence[str]) -> None:
        """Open files of encoded rows, which have been verified, and read their index.

        Args:
            parts: files in the order of the rows.
            names: of the source's files.

        Raises:
            OSError, pyarrow.ArrowInvalid: a file is missing, or changed since it was verified.
        """
        self._names = tuple(names)
        descriptors: list[int] = []
        weakref.finalize(self, _close, descriptors)
        self._batches: list[_RecordBatch] = []
        indices: list[_Index] = []
        for path in parts:
            descriptors.append(_open(path))
            for batch, index in _read_index(path, descriptors[-1]):
                self._batches.append(batch)
                indices.append(index)
        self._starts = np.cumsum([0, *(batch.rows for batch in self._batches)])
        empty = np.zeros(0, np.int32)
        self.lengths = np.concatenate([empty, *(index.lengths for index in indices)])
        self.supervised = np.concatenate([empty, *(index.supervised for index in indices)])
        self.keys = np.concatenate([empty.astype(np.uint64), *(index.keys for index in indices)])

    def __len__(self) -> int:
        return len(self.lengths)

    def document_keys(self) -> npt.NDArray[np.uint64]:
        """Return for each row the key of the first row from the same line, uint64 [rows]: a document can be several."""
        places = [batch.places() for batch in self._batches]
        changes = np.diff(np.concatenate(places), axis=0).any(axis=1) if places else np.zeros(0, bool)
        first = np.concatenate([np.ones(min(len(self), 1), bool), changes])
        return self.keys[np.maximum.accumulate(np.where(first, np.arange(len(self)), 0))]

    def __getitem__(self, index: int) -> Row:
        """Read a row.

        Raises:
            LoraError: its file was changed since it was opened (exit code 1).
        """
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].row(index - int(self._starts[number]), self._names, key=int(self.keys[index]))


class _RecordBatch(NamedTuple):
    """The place of a record batch in an open file."""

    path: Path
    descriptor: int
    rows: int
    at: dict[str, int]  # byte offset of each column's values

    def row(self, index: int, names: Sequence[str], *, key: int) -> Row:
        head = HEAD.unpack(self._read("head", index * HEAD.size, HEAD.size))
        pair_tokens, file, line, expected = head[6:]
        ids = self._list("ids", head[0], head[1])
        spans = self._list("runs", head[2], head[3])
        values = self._list("values", head[4], head[5], itemsize=8)
        if expected != _row_checksum((ids, spans, values), (pair_tokens, file, line), key=key):
            raise self._changed()
        input_ids, where = np.frombuffer(ids, np.int32), f"{names[file]}:{line}"
        if values:
            return Row(input_ids, np.frombuffer(values, np.float64), where, pair_tokens)
        return Row(input_ids, labels_of_spans(input_ids, np.frombuffer(spans, np.int32).reshape(-1, 2)), where)

    def places(self) -> npt.NDArray[np.int64]:
        """Return file and line of each row, int64 [rows, 2]."""
        heads = np.frombuffer(self._read("head", 0, self.rows * HEAD.size), HEAD_DTYPE)
        return np.stack([heads["file"], heads["line"]], axis=1).astype(np.int64)

    def _list(self, column: str, start: int, stop: int, itemsize: int = 4) -> bytes:
        """Return the items of a row in a column of lists."""
        return self._read(column, start * itemsize, (stop - start) * itemsize) if stop > start else b""

    def _read(self, column: str, start: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, max(0, self.at[column] + start))
        if len(data) != size:
            raise self._changed()
        return data

    def _changed(self) -> LoraError:
        return LoraError(
            f"{self.path} was changed by another program while its rows were read",
            hint="start again, a run with --resume: the rows are encoded again",
            exit_code=1,
        )


class _Index(NamedTuple):
    """What is in memory of the rows of a record batch, see `EncodedRows`."""

    lengths: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    keys: npt.NDArray[np.uint64]


def _read_index(path: Path, descriptor: int) -> Iterator[tuple[_RecordBatch, _Index]]:
    """Yield the place of each record batch of a file, with the index of its rows.

    In memory is one record batch at a time. The format: a magic number of 8 bytes, then messages of metadata and body,
    as in a stream of Arrow (https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format).
    """
    with pa.OSFile(str(path)) as stream:  # a position of its own; the descriptor is read at given positions only
        stream.seek(8)
        schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
        while (message := _next_message(stream)) is not None:
            start = stream.tell() - message.body.size
            batch = pa.ipc.read_record_batch(message, schema)

            def place(buffer: pa.Buffer, start: int = start, body: pa.Buffer = message.body) -> int:
                return int(start + buffer.address - body.address)

            at = {name: place(column.buffers()[-1]) for name, column in zip(schema.names, batch.columns, strict=True)}
            lengths = np.diff(_numbers(batch.column("ids").offsets))
            # Copies: views would keep every record batch in memory until the last file is read.
            supervised, keys = (_numbers(batch.column(name)).copy() for name in ("supervised", "key"))
            index = _Index(lengths, supervised, keys)
            yield _RecordBatch(path, descriptor, len(batch), at), index


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    """Return a view of an Arrow array of numbers. Its own `to_numpy` would import pandas."""
    return np.from_dlpack(array)


def _next_message(stream: pa.OSFile) -> pa.Message | None:
    try:
        return pa.ipc.read_message(stream)
    except EOFError:  # the end mark of the stream, which the footer of the file follows
        return None


def _open(path: Path) -> int:
    """Open a file for as long as its rows are used, and raise the process's limit of open files if it is near.

    Raises:
        OSError: the file is missing, a link, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptor > soft - SPARE_FILES and (hard == resource.RLIM_INFINITY or soft < hard):
        # Some systems refuse an infinite limit.
        wanted = soft * 4 if hard == resource.RLIM_INFINITY else min(hard, soft * 4)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
