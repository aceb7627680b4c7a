"""Read and write safetensors files and shards piece by piece at byte offsets, without memory mapping.

`safetensors_header` describes the format. Pages read from a memory-mapped file would count as resident memory.
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.safetensors_header import INDEX_FILE, SINGLE_FILE, StoredTensor, read_headers

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
FSYNC_EVERY_S = 0.5


class TensorInfo(NamedTuple):
    """The location, dtype and shape of one tensor in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    size: int  # bytes


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the model in `folder`, by name, from the headers of its safetensors files.

    Raises:
        LoraError: the files are missing or damaged, see `read_headers`, or a tensor has a dtype that torch lacks.
    """
    tensors = {}
    for name, stored in read_headers(folder).items():
        info = tensor_info(stored)
        if info is None:
            raise LoraError(
                f"{stored.file}: {name} has the unsupported dtype {stored.dtype}",
                hint=f"use one of {', '.join(DTYPES)}",
            )
        tensors[name] = info
    return tensors


def tensor_info(stored: StoredTensor) -> TensorInfo | None:
    """Return the tensor of a header with its dtype in torch; None if torch has no such dtype."""
    dtype = DTYPES.get(stored.dtype)
    return None if dtype is None else TensorInfo(stored.file, dtype, stored.shape, stored.begin, stored.size)


class ShardFiles:
    """Open files by path, to read and write at byte offsets from several threads."""

    def __init__(self, *, writable: bool) -> None:
        self._flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def open(self, file: Path) -> int:
        """Return the descriptor of `file`. Only one thread may make the first call for a file."""
        if file not in self._open:
            self._open[file] = os.open(file, self._flags, 0o666)
        return self._open[file]

    @contextmanager
    def background_fsync(self) -> Iterator[None]:
        """Fsync all open files in a background thread during the block, and once more after it, unless it raised."""
        done = threading.Event()

        def fsync_periodically() -> None:
            while not done.wait(FSYNC_EVERY_S):
                for descriptor in list(self._open.values()):
                    os.fsync(descriptor)

        thread = threading.Thread(target=fsync_periodically, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def allocate(self, file: Path, size: int) -> None:
        """Set the length of `file` to `size` bytes and allocate them on disk.

        Raises:
            OSError: the disk has too little space (on macOS this shows only when the bytes are written).
        """
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(self.open(file), 0, size)
        else:
            os.ftruncate(self.open(file), size)

    def read(self, file: Path, into: memoryview, at: int) -> None:
        """Fill `into` with the bytes of `file` from offset `at`.

        Raises:
            LoraError: the file ends before `into` is full.
        """
        done = 0
        while done < len(into):
            count = os.preadv(self.open(file), [into[done:]], at + done)
            if not count:
                raise LoraError(f"{file}: ended while it was read", hint="fetch it again", exit_code=1)
            done += count

    def read_tensor(self, info: TensorInfo) -> Tensor:
        """Return a full tensor, in its stored shape and dtype."""
        value = torch.empty(info.shape, dtype=info.dtype)
        self.read(info.file, as_bytes(value), info.begin)
        return value

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Return rows of a tensor along its first dimension, [stop - start, ...], in its stored dtype."""
        value = torch.empty(stop - start, *info.shape[1:], dtype=info.dtype)
        self.read(info.file, as_bytes(value), info.begin + start * (info.size // info.shape[0]))
        return value

    def write(self, file: Path, data: memoryview, at: int) -> None:
        """Write `data` to `file` at offset `at`."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.open(file), data[done:], at + done)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any shape and dtype as bytes, without a copy."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def plan_shards(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], folder: Path, files: ShardFiles, *, max_size: int
) -> dict[str, TensorInfo]:
    """Create the shards of a model in `folder`, with their headers, the index, and allocated space for the tensors.

    Args:
        tensors: dtype and shape of each tensor, by name.
        folder: of the model.
        files: opens the shards.
        max_size: bytes of tensors per shard. A larger tensor gets a shard of its own.

    Returns:
        The location of each tensor, by name.

    Raises:
        OSError: the disk has too little space.
    """
    groups: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and sum(groups[-1].values()) + size > max_size:
            groups.append({})
        groups[-1][name] = size
    count = len(groups)
    placed: dict[str, TensorInfo] = {}
    for number, group in enumerate(groups, start=1):
        file = folder / (SINGLE_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # Widest dtypes first, so that each tensor is aligned to its item size, as the safetensors library orders them.
        for name in sorted(group, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + group[name]]}
            at += group[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        files.allocate(file, start + at)
        files.write(file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for name in group:
            begin = start + header[name]["data_offsets"][0]
            placed[name] = TensorInfo(file, *tensors[name], begin, group[name])
    if count > 1:
        total = sum(sum(group.values()) for group in groups)
        weight_map = {name: info.file.name for name, info in sorted(placed.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return placed
