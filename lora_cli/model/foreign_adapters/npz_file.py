"""Read the arrays of an .npz file, in which mlx-lm saved adapters before it used safetensors; no pickled objects."""

import io
import math
import tokenize
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.stored_zip import StoredZip, open_stored_zip
from lora_cli.model.foreign_adapters.torch_file import MAX_DIMENSIONS
from lora_cli.run.read_file import printable

FETCH_HINT = "fetch the adapter again"
SUFFIX = ".npy"  # of each entry
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
BFLOAT16 = np.dtype("V2")  # as mlx writes it: numpy has no such numbers
MAX_HEADER = 1 << 16  # bytes
# What numpy raises for a header that is damaged: it is a Python literal, which older files have in other spellings.
HEADER_ERRORS = (
    ValueError, KeyError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError, tokenize.TokenError,
)  # fmt: skip


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of `path` by name, as tensors of their dtype.

    Raises:
        LoraError: the file is not complete, or has anything else than floating-point arrays.
    """
    with open_stored_zip(path, hint=FETCH_HINT) as archive:
        return {name.removesuffix(SUFFIX): _read_array(archive, name) for name in archive.entries}


def _read_array(archive: StoredZip, name: str) -> Tensor:
    content = io.BytesIO(archive.read(name))
    try:
        version = np.lib.format.read_magic(content)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](content, max_header_size=MAX_HEADER)
    except HEADER_ERRORS:
        raise archive.damage(f"{printable(name)} is no array of numpy") from None
    if dtype not in (*DTYPES, BFLOAT16):
        raise LoraError(f"{archive.path}: {printable(name)} has values of {dtype}, not float32", hint=FETCH_HINT)
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise archive.damage(f"{printable(name)} has the shape {printable(shape)}")
    values = content.getbuffer()[content.tell() :]
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise archive.damage(f"{printable(name)} has {len(values):,} bytes for the shape {shape}")
    stored = np.dtype(np.int16) if dtype == BFLOAT16 else dtype
    array = np.frombuffer(values, dtype=stored).reshape(shape, order="F" if fortran else "C")
    tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
    return tensor.view(torch.bfloat16) if dtype == BFLOAT16 else tensor
