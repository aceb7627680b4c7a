"""Read and validate the header of a GGUF file (metadata and tensor table) before a library reads the file.

The readers of transformers and of the gguf package trust every count, length and offset of the file. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here reads a tensor.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run.read_file import open_regular, printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
LAYER = re.compile(r"blk\.([0-9]{1,9})\.")
MAX_SIZE = 2**31  # of a dimension of the model
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
MIN_ENTRY = 13  # bytes of the smallest metadata entry: the length of its key, its type, and a value
MIN_TENSOR = 32  # bytes of the smallest entry of the tensor table
DEFAULT_ALIGNMENT = 32
FETCH_HINT = "fetch the file again, or use the model's original (safetensors) folder or hub id as model.path"
# Sizes of the model, after the name of the architecture.
SIZES = ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count")
TOKEN_LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}


class GGUFTensorInfo(NamedTuple):
    """The location, type and shape of one tensor in a GGUF file."""

    type: int  # of ggml
    shape: tuple[int, ...]  # in torch's order: rows first
    begin: int  # bytes from the start of the file
    size: int  # bytes


class GGUFHeader(NamedTuple):
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]  # by llama.cpp's names

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])


class _Wrong(Exception):
    """A file breaks the format; the text says how."""


class _Reader:
    """Reads values of the header one after the other, never past the end of the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = stream.seek(0, 2)
        self.at = stream.seek(0)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _Wrong("the file is truncated")
        self.at += count
        return self.stream.read(count)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, what: str, smallest: int) -> int:
        """Read how many values follow, each of at least `smallest` bytes."""
        count = int(self.number("<Q"))
        if count * smallest > self.size - self.at:
            raise _Wrong(f"it announces {count:,} {what}, more than the file has room for")
        return count

    def text(self) -> str:
        data = self.take(self.count("bytes of text", 1))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise _Wrong(f"a text is not UTF-8: {printable(data[:50])}") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            value = self.number(NUMBERS[kind])
            if kind == BOOL and value > 1:
                raise _Wrong(f"a truth value is {value}")
            return bool(value) if kind == BOOL else value
        if kind != ARRAY:
            raise _Wrong(f"a value has the unknown type {kind}")
        inner = self.number("<I")
        if inner == STRING:
            return [self.text() for _ in range(self.count("texts", 8))]
        if inner not in NUMBERS:
            raise _Wrong(f"an array has values of type {inner}")
        width = struct.calcsize(NUMBERS[inner])
        count = self.count("numbers", width)
        return list(struct.unpack(f"<{count}{NUMBERS[inner][1]}", self.take(count * width)))


def read_gguf_header(file: Path, *, hint: str = FETCH_HINT) -> GGUFHeader:
    """Read the header of a GGUF file, and check it against the file's size and itself.

    Raises:
        LoraError: it is not a regular file, not a GGUF file, truncated, or its header cannot be right.
    """
    with open_regular(file, hint=hint) as stream:
        try:
            return _read(_Reader(stream))
        except _Wrong as problem:
            raise LoraError(f"{file} is not a GGUF file that can be read: {problem}", hint=hint) from None


def _read(reader: _Reader) -> GGUFHeader:
    if reader.size < len(MAGIC) or reader.take(4) != MAGIC:
        raise _Wrong(f"it does not begin with {MAGIC.decode()}")
    version = reader.number("<I")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        byte_order = ", or of a machine with another byte order" if version > 2**16 else ""
        raise _Wrong(f"it is of version {version:,}{byte_order}; versions {known} are supported")
    tensor_count = reader.count("tensors", MIN_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(reader.count("metadata entries", MIN_ENTRY)):
        key = reader.text()
        if key in metadata:
            raise _Wrong(f"{printable(key)} is there twice")
        metadata[key] = reader.value(reader.number("<I"))
    _check_metadata(metadata)
    tensors = _read_tensors(reader, tensor_count, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    key = f"{metadata['general.architecture']}.block_count"
    numbers = [int(match[1]) for match in map(LAYER.match, tensors) if match]
    if numbers and metadata.get(key) != max(numbers) + 1:
        found = printable(metadata.get(key, "missing"))
        raise _Wrong(f"it has tensors of {max(numbers) + 1:,} layers, and {key} is {found}")
    tokens, embeddings = metadata.get("tokenizer.ggml.tokens"), tensors.get("token_embd.weight")
    if tokens is not None and embeddings is not None and len(tokens) > embeddings.shape[0]:
        raise _Wrong(f"it has {len(tokens):,} tokens, but embeddings of {embeddings.shape[0]:,}")
    return GGUFHeader(metadata, tensors)


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, GGUFTensorInfo]:
    """Read the table of tensors; their data begin at the next multiple of `alignment` after it."""
    import gguf  # an optional dependency

    table: dict[str, tuple[int, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text()
        if name in table:
            raise _Wrong(f"the tensor {printable(name)} is there twice")
        dimensions = reader.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Wrong(f"the tensor {printable(name)} has {dimensions:,} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))[::-1]
        kind, offset = reader.number("<I"), reader.number("<Q")
        if kind not in (known := {int(each): sizes for each, sizes in gguf.GGML_QUANT_SIZES.items()}):
            raise _Wrong(f"the tensor {printable(name)} has the unknown type {kind}")
        block, block_bytes = known[kind]
        if not all(shape) or math.prod(shape) >= 2**63 or shape[-1] % block:
            raise _Wrong(f"the tensor {printable(name)} has the impossible shape {'x'.join(map(str, shape))}")
        if offset % alignment:
            raise _Wrong(f"the tensor {printable(name)} begins at byte {offset:,}, not a multiple of {alignment}")
        table[name] = kind, shape, offset, math.prod(shape) // block * block_bytes
    start = (reader.at + alignment - 1) // alignment * alignment
    end = 0
    for name, (_, _, offset, size) in sorted(table.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise _Wrong(f"the bytes of {printable(name)} overlap those of another tensor")
        end = offset + size
    if start + end > reader.size:
        raise _Wrong(f"the file is truncated: {reader.size:,} bytes, but its header describes {start + end:,}")
    return {
        name: GGUFTensorInfo(kind, shape, start + offset, size) for name, (kind, shape, offset, size) in table.items()
    }


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Check the types and ranges of the values that a model is built from."""

    def check(key: str, is_right: Callable[[Any], bool], *, required: bool = False) -> None:
        if key not in metadata and required:
            raise _Wrong(f"its metadata have no {key}")
        if key in metadata and not is_right(metadata[key]):
            raise _Wrong(f"its metadata have {key} = {printable(metadata[key])}")

    check("general.architecture", lambda value: isinstance(value, str) and value != "", required=True)
    check("general.alignment", lambda value: _is_int(value) and value >= 8 and value % 8 == 0 and value < 2**20)
    check("split.count", _is_int)
    if metadata.get("split.count", 0) > 1:
        raise _Wrong("it is one of several parts; join them with llama-gguf-split --merge")
    for key, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong(f"its metadata have {printable(key)} = {value}")
    prefix = metadata["general.architecture"]
    for name in SIZES:
        check(f"{prefix}.{name}", _is_sizes)
    check("tokenizer.ggml.model", lambda value: isinstance(value, str))
    check("tokenizer.chat_template", lambda value: isinstance(value, str))
    for name, kind in TOKEN_LISTS.items():
        check(f"tokenizer.ggml.{name}", partial(_is_list_of, kind=kind))
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    for name in ("scores", "token_type"):
        check(f"tokenizer.ggml.{name}", lambda value: len(value) == len(tokens))
    for key in metadata:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            check(key, lambda value: _is_int(value) and 0 <= value < len(tokens))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sizes(value: Any) -> bool:
    """Return whether a value is a size, or one for each layer; layers without attention have 0 heads."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_is_int(size) and 0 <= size < MAX_SIZE for size in values) and max(values) > 0


def _is_list_of(value: Any, *, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)
