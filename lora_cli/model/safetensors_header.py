"""Read and validate the headers of safetensors files, and the index of a sharded model, before anything uses them.

The format: eight bytes of header length (little endian), a JSON header with dtype, shape and offsets of each tensor,
then the tensors' bytes without gaps. The rules are those of the safetensors library; its own errors name no file, and
transformers reads an index without any check. Nothing here reads a tensor.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lora_cli.errors import LoraError, first_line
from lora_cli.run.read_file import open_regular, printable, read_json_object
from lora_cli.run.shell import python_text

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Bits of a value, by the names of the safetensors format.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
MAX_SIZE = 2**63  # sizes and offsets are signed 64-bit numbers in torch
FETCH_HINT = "fetch the file again"


class StoredTensor(NamedTuple):
    """The location, dtype and shape of one tensor in a safetensors file."""

    file: Path
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    size: int  # bytes


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder has the safetensors of a model, complete or not; a link to nothing counts."""
    return os.path.lexists(folder / SINGLE_FILE) or os.path.lexists(folder / INDEX_FILE)


def read_headers(folder: Path, *, hint: str = FETCH_HINT) -> dict[str, StoredTensor]:
    """Return every tensor of the model in `folder`, by name, from the headers of the files that transformers loads.

    Raises:
        LoraError: the folder has no safetensors; a file is missing, damaged, or not a regular file; index and files
            disagree; or it is not clear which files are the model.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE  # links to nothing count too: they are named below
    if os.path.lexists(index):
        shards = _read_index(index, hint=hint)
        if os.path.lexists(single) and set(shards.values()) != {SINGLE_FILE}:
            raise LoraError(
                f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}, which lists other files: it is not clear which of "
                "them is the model",
                hint="remove the one that does not belong to it",
            )
        return _read_shards(folder, shards, hint=hint)
    if os.path.lexists(single):
        return read_header(single, hint=hint)
    bin_files = sorted(path.name for path in folder.glob("*.bin"))
    if bin_files:
        raise LoraError(f"{folder} has no {SINGLE_FILE}, only {bin_files[0]}", hint=conversion_hint(folder))
    raise LoraError(f"{folder} has no {SINGLE_FILE}", hint="give a complete model, with its weights")


def conversion_hint(folder: Path | str) -> str:
    """Return the hint for a model whose weights are pickled, in .bin files."""
    target = f"{Path(folder).name}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[c.from_pretrained({python_text(folder)}).save_pretrained({python_text(target)}) for c in (M, T)]"
    )
    return f"lora reads no pickled weights; convert them once, if you trust their origin: python -c {shlex.quote(code)}"


def read_header(file: Path, *, hint: str = FETCH_HINT) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file, by name.

    Raises:
        LoraError: it is not a regular file, or not a complete and well-formed safetensors file.
    """
    with open_regular(file, hint=hint) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise LoraError(f"{file}: truncated, or not a safetensors file", hint=hint)
        if length > MAX_HEADER_BYTES:
            raise LoraError(f"{file}: not a safetensors file: its header has {length:,} bytes", hint=hint)
        text = stream.read(length)
    header = _parse(text, file, hint=hint)
    start, at = 8 + length, 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1], item[0], file, hint)):
        begin, end = _offsets(entry, name, file, hint)
        if begin != at:
            problem = "overlap those of another tensor" if begin < at else f"leave out {begin - at:,} before it"
            raise LoraError(f"{file}: the bytes of {printable(name)} {problem}", hint=hint)
        at = end
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if (bits := math.prod(shape) * DTYPE_BITS[dtype]) != (end - begin) * 8:
            shape_text = "x".join(map(str, shape)) or "a single number"
            raise LoraError(
                f"{file}: {printable(name)} has {end - begin:,} bytes, but {shape_text} of {dtype} needs {bits // 8:,}",
                hint=hint,
            )
        tensors[name] = StoredTensor(file, dtype, shape, start + begin, end - begin)
    if start + at != size:
        kind = "truncated: " if start + at > size else ""
        raise LoraError(f"{file}: {kind}{size:,} bytes, but its header describes {start + at:,}", hint=hint)
    _check_with_library(file, hint=hint)
    return {name: tensors[name] for name in header}


def check_weights_are_floats(tensors: Mapping[str, StoredTensor], *, hint: str = FETCH_HINT) -> None:
    """Check the dtypes of a model that is not quantized; a library would convert other numbers to weights silently.

    Raises:
        LoraError: a tensor whose name ends in `weight` is stored as integers or truth values.
    """
    for name, stored in tensors.items():
        if name.endswith("weight") and stored.dtype[0] in "IUB" and stored.dtype != "BF16":
            raise LoraError(
                f"{stored.file}: {printable(name)} is stored as {stored.dtype}, but config.json has no quantization",
                hint=hint,
            )


def _parse(text: bytes, file: Path, *, hint: str) -> dict[str, Any]:
    """Return the header's entries by tensor name, without the metadata."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LoraError(f"{file}: its header has {printable(twice)} twice", hint=hint)
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=refuse_duplicates)
    except UnicodeDecodeError:
        raise LoraError(f"{file}: not a safetensors file: its header is not UTF-8", hint=hint) from None
    except (ValueError, RecursionError):
        raise LoraError(f"{file}: not a safetensors file: its header is not JSON", hint=hint) from None
    if not isinstance(header, dict):
        raise LoraError(f"{file}: not a safetensors file: its header is not a JSON object", hint=hint)
    metadata = header.pop("__metadata__", None)
    texts = metadata.values() if isinstance(metadata, dict) else [metadata]
    if metadata is not None and not all(isinstance(value, str) for value in texts):
        raise LoraError(f"{file}: the __metadata__ of its header are not texts", hint=hint)
    for name, entry in header.items():
        if problem := _entry_problem(entry):
            raise LoraError(f"{file}: the header's entry of {printable(name)} has {problem}", hint=hint)
    return header


def _check_with_library(file: Path, *, hint: str) -> None:
    """Raise if the library, which reads the tensors later, refuses the file: Python's JSON accepts more than Rust's."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise LoraError(f"{file}: not a safetensors file: {printable(first_line(error))}", hint=hint) from None


def _entry_problem(entry: Any) -> str | None:
    """Return what is wrong with the types of a header's entry; None if they are right."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "other keys than dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPE_BITS:
        return f"the unknown dtype {printable(entry['dtype'])}"
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or not all(_is_size(value) for value in entry[key]):
            return f"{key} {printable(entry[key])}: not a list of sizes"
    if len(entry["data_offsets"]) != 2:
        return f"data_offsets {printable(entry['data_offsets'])}: not a begin and an end"
    return None


def _offsets(entry: dict[str, Any], name: str, file: Path, hint: str) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    if end < begin:
        raise LoraError(f"{file}: {printable(name)} ends at byte {end:,}, before it begins at {begin:,}", hint=hint)
    return begin, end


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _read_index(file: Path, *, hint: str) -> dict[str, str]:
    """Return the names of the shards, by tensor name."""
    index = read_json_object(file, hint=hint)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoraError(f"{file} has no weight_map of tensors and files", hint=hint)
    if not isinstance(index.get("metadata"), dict):  # which transformers requires
        raise LoraError(f"{file} has no metadata", hint='add "metadata": {} to it, or fetch it again')
    for name, shard in weight_map.items():
        # A shard is in the folder of its index: other files on this machine are none of a model's business.
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or not shard.endswith(".safetensors")
            or "\0" in shard
        ):
            raise LoraError(
                f"{file}: the file of {printable(name)} is {printable(shard)}: not a .safetensors file in its folder",
                hint=hint,
            )
    return weight_map


def _read_shards(folder: Path, shards: dict[str, str], *, hint: str) -> dict[str, StoredTensor]:
    names = sorted(set(shards.values()))
    tensors: dict[str, StoredTensor] = {}
    for shard in names:
        if not os.path.lexists(folder / shard):
            raise LoraError(
                f"{folder}: shard {printable(shard)} is missing; the index lists {len(names)} shards", hint=hint
            )
        for name, stored in read_header(folder / shard, hint=hint).items():
            if name in tensors:
                raise LoraError(
                    f"{folder}: {printable(name)} is in two shards, {tensors[name].file.name} and {shard}", hint=hint
                )
            tensors[name] = stored
    for name, shard in shards.items():
        if name not in tensors:
            raise LoraError(
                f"{folder}: {printable(name)} is not in any shard; the index lists it in {shard}", hint=hint
            )
        if tensors[name].file.name != shard:
            raise LoraError(
                f"{folder}: {printable(name)} is in {tensors[name].file.name}, but the index lists it in {shard}",
                hint=hint,
            )
    # Tensors that only a shard lists are part of the model too: transformers loads them.
    return {name: tensors[name] for name in [*shards, *(name for name in tensors if name not in shards)]}
