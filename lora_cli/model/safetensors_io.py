"""Safetensors files read and written a piece at a time, by their offsets: nothing is mapped, nothing is held.

The format: eight bytes of header length (little endian), a JSON header with dtype, shape and offsets of each tensor,
and the tensors' bytes end to end. A mapped file would count as resident memory as far as it was read.
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lora_cli.errors import LoraError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20  # bytes; the library's own limit
FSYNC_EVERY_S = 0.5  # seconds
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    size: int  # bytes


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the model in `folder`, by name, from the headers of its files.

    Raises:
        LoraError: no safetensors, a shard that is missing, cut short or none, or a tensor that its shard lacks.
    """
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, TensorInfo] = {}
        for name in sorted(set(index.values())):
            if not (folder / name).is_file():
                raise LoraError(
                    f"{folder}: shard {name} is missing, of {len(set(index.values()))} that its index lists",
                    hint="fetch the model again",
                )
            found |= _list_tensors_of_file(folder / name)
        if lacking := sorted(index.keys() - found.keys()):
            raise LoraError(
                f"{folder}: {lacking[0]} is in none of its shards, though the index says {index[lacking[0]]}",
                hint="fetch the model again",
            )
        return {name: found[name] for name in index}
    if (folder / SINGLE_FILE).is_file():
        return _list_tensors_of_file(folder / SINGLE_FILE)
    held = sorted(path.name for path in folder.glob("*.bin"))
    raise LoraError(
        f"{folder} has no {SINGLE_FILE}" + (f", only {held[0]}" if held else ""),
        hint="load it with transformers once and save it: its save_pretrained writes safetensors",
    )


def _list_tensors_of_file(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise LoraError(f"{file}: cut short, or no safetensors file", hint="fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise LoraError(f"{file}: its header is no JSON: no safetensors file", hint="fetch it again") from None
    header.pop("__metadata__", None)
    start = 8 + length
    needed = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise LoraError(
            f"{file}: cut short: {size:,} bytes, where its header tells of {needed:,}", hint="fetch it again"
        )
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise LoraError(f"{file}: {name} has dtype {entry['dtype']}", hint="give a model of a dtype that torch has")
        tensors[name] = TensorInfo(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin)
    return tensors


class ShardFiles:
    """Open files by path, for reading and writing at offsets, from several threads."""

    def __init__(self, *, writable: bool) -> None:
        self._flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def open(self, file: Path) -> int:
        """The descriptor of `file`; the first call for a file is to come from one thread alone."""
        if file not in self._open:
            self._open[file] = os.open(file, self._flags, 0o666)
        return self._open[file]

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """Have the disk take what is written while more is being written; all of it, when the block ends well."""
        done = threading.Event()

        def flush() -> None:
            while not done.wait(FSYNC_EVERY_S):
                for descriptor in list(self._open.values()):
                    os.fsync(descriptor)

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def reserve(self, file: Path, size: int) -> None:
        """Make `file` so many bytes long, and have the disk set them aside: one that is too small says so now."""
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(self.open(file), 0, size)
        else:
            os.ftruncate(self.open(file), size)

    def read(self, file: Path, into: memoryview, at: int) -> None:
        """Fill `into` from the bytes of `file` that begin `at`."""
        done = 0
        while done < len(into):
            count = os.preadv(self.open(file), [into[done:]], at + done)
            if not count:
                raise LoraError(f"{file}: cut short while it was read", hint="fetch it again", exit_code=1)
            done += count

    def write(self, file: Path, data: memoryview, at: int) -> None:
        """Put `data` into `file`, beginning `at`."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.open(file), data[done:], at + done)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def plan_shards(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], folder: Path, files: ShardFiles, *, largest: int
) -> dict[str, TensorInfo]:
    """Make the files of a model in `folder`, each of up to `largest` bytes, with headers, and room for the tensors.

    A tensor that is larger has a file of its own. Returns where each one goes.
    """
    groups: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and sum(groups[-1].values()) + size > largest:
            groups.append({})
        groups[-1][name] = size
    count = len(groups)
    placed: dict[str, TensorInfo] = {}
    for number, group in enumerate(groups, start=1):
        file = folder / (SINGLE_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # The widest dtypes first, so that each tensor is aligned to its own, as the library has it.
        for name in sorted(group, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + group[name]]}
            at += group[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        files.reserve(file, start + at)
        files.write(file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for name in group:
            begin = start + header[name]["data_offsets"][0]
            placed[name] = TensorInfo(file, *tensors[name], begin, group[name])
    if count > 1:
        total = sum(sum(group.values()) for group in groups)
        where = {name: stored.file.name for name, stored in sorted(placed.items())}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return placed


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB`.

    Raises:
        LoraError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise LoraError(f"--max-shard-size {text} is no size", hint="write a number of bytes with a unit, such as 5GB")
    return int(float(match[1]) * SIZE_UNITS[(match[2] or "").upper()])
