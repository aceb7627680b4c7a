"""The part of the fault campaign with files of rows: every type and compression, mutated, and special rows.

for case in row_file_cases(seed): outcome = try_row_file(case, folder)     # endless: take as many as wanted
for case in special_row_cases(): outcome = try_special_row(case, folder)
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.schema import DataSpec
from tests.faults import mutate
from tests.faults.outcome import Outcome, run_case, silent
from tests.inputs.tiny_tokenizers import CHATML, build

COUNT = 60  # rows of each file


def _rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and {number}? Grüße, 中文 {'word ' * (number % 7)}"},
                {"role": "assistant", "content": f"It is {2 * number}. " + "The answer. " * (number % 5)},
            ]
        }
        for number in range(COUNT)
    ]


def _jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(_rows())).encode()


def _cells(delimiter: str) -> bytes:
    lines = [delimiter.join(("prompt", "completion"))]
    for row in _rows():
        lines.append(delimiter.join('"' + message["content"].replace('"', '""') + '"' for message in row["messages"]))
    return "\n".join([*lines, ""]).encode()


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=25, data_page_size=1024, **options)
    return sink.getvalue()


def _flat_table() -> pa.Table:
    pairs = [[message["content"] for message in row["messages"]] for row in _rows()]
    return pa.table(
        {
            "instruction": pa.array([pair[0] for pair in pairs], pa.string()),
            "output": pa.array([pair[1] for pair in pairs], pa.large_string()),
            "number": pa.array(range(COUNT), pa.int64()),
            "score": pa.array([number / 7 for number in range(COUNT)], pa.float32()),
            "kind": pa.array([f"kind {number % 3}" for number in range(COUNT)]).dictionary_encode(),
        }
    )


def _zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def _zip(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", data)
    return sink.getvalue()


def _two_streams(compress: Callable[[bytes], bytes]) -> bytes:
    """Return the rows as two compressed streams in one file, as parallel compressors write them."""
    data = _jsonl()
    middle = data.index(b"\n", len(data) // 2) + 1
    return compress(data[:middle]) + compress(data[middle:])


NESTED = pa.Table.from_pylist(_rows())
# Content by the name of the file. What is in CHECKED has checksums: rows that differ from those written are a fault.
FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": _jsonl,
    "rows.json": lambda: json.dumps(_rows(), indent=1).encode(),
    "rows.csv": lambda: _cells(","),
    "rows.tsv": lambda: _cells("\t"),
    "rows.txt": lambda: "".join(f"{row['messages'][1]['content']}\n" for row in _rows()).encode(),
    "rows.jsonl.gz": lambda: gzip.compress(_jsonl(), mtime=0),
    "two.jsonl.gz": lambda: _two_streams(lambda data: gzip.compress(data, mtime=0)),
    "rows.jsonl.bz2": lambda: bz2.compress(_jsonl()),
    "two.jsonl.bz2": lambda: _two_streams(bz2.compress),
    "rows.jsonl.xz": lambda: lzma.compress(_jsonl()),
    "two.jsonl.xz": lambda: _two_streams(lzma.compress),
    "rows.jsonl.zst": lambda: _zst(_jsonl()),
    "two.jsonl.zst": lambda: _two_streams(_zst),
    "rows.jsonl.zip": lambda: _zip(_jsonl()),
    "plain.parquet": lambda: _parquet(_flat_table(), compression="none", use_dictionary=False),
    "snappy.parquet": lambda: _parquet(_flat_table(), compression="snappy"),
    "zstd.parquet": lambda: _parquet(NESTED, compression="zstd"),
    "gzip.parquet": lambda: _parquet(NESTED, compression="gzip", data_page_version="2.0"),
    "checked.parquet": lambda: _parquet(NESTED, compression="snappy", write_page_checksum=True),
    "saved": _jsonl,  # the folder of a saved dataset
}
CHECKED = {
    *("rows.jsonl.gz", "two.jsonl.gz", "rows.jsonl.bz2", "two.jsonl.bz2", "rows.jsonl.xz", "two.jsonl.xz"),
    *("rows.jsonl.zip", "checked.parquet"),
}
# Mutations that leave a whole file: the same stream twice is the rows twice.
WHOLE = {"repeat all"}


class RowFile(NamedTuple):
    """A mutated file of rows."""

    name: str  # a key of FILES
    seed: str


def row_file_cases(seed: int, names: tuple[str, ...] = tuple(FILES)) -> Iterator[RowFile]:
    """Yield mutated files of rows without end, of each type in turn."""
    for number in itertools.count():
        for name in names:
            yield RowFile(name, f"{seed} {number} {name}")


def try_row_file(case: RowFile, folder: Path) -> Outcome:
    """Prepare the rows of a mutated file as `lora train` does; `folder` is for its files."""
    path = folder / case.name
    shutil.rmtree(folder / "cache", ignore_errors=True)
    mutation = mutate.Mutation("", None)
    if case.name == "saved":
        _write_mutated_dataset(case, path)
    else:
        mutation = mutate.mutate_bytes(_content(case.name), case.seed)
        path.write_bytes(mutation.value)
    is_checked = case.name in CHECKED and mutation.name not in WHOLE
    expected = _fingerprint(case.name, folder) if is_checked else None

    def prepare() -> Outcome | None:
        found = _prepare(path, folder / "cache")
        return silent("other rows than were written") if expected not in (None, found) else None

    return run_case(prepare)


@cache
def _content(name: str) -> bytes:
    return FILES[name]()


@cache
def _fingerprint(name: str, folder: Path) -> str:
    intact = folder / "intact"
    intact.mkdir(exist_ok=True)
    (intact / name).write_bytes(_content(name))
    return _prepare(intact / name, folder / "intact-cache")


@cache
def _tokenizer() -> Any:
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


def _prepare(path: Path, cache_folder: Path) -> str:
    spec = DataSpec(train=str(path), eval=None, max_length=100_000_000)
    return prepare_data(spec, _tokenizer(), seed=0, cache=cache_folder, info=lambda line: None).fingerprint


def _write_mutated_dataset(case: RowFile, folder: Path) -> None:
    import datasets

    shutil.rmtree(folder, ignore_errors=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(_rows()).save_to_disk(str(folder))
    files = sorted(file for file in folder.iterdir() if file.is_file())
    file = files[len(case.seed.split()[1]) * 7 % len(files) if int(case.seed.split()[1]) % 3 else 0]
    file.write_bytes(mutate.mutate_bytes(file.read_bytes(), case.seed).value)
