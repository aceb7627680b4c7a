"""Turn a GGUF file into a plain transformers folder, once: the same numbers, dequantised, then loaded in a second.

transformers reads a GGUF's vocabulary and tensors through Python loops that take half a minute on a small model,
at every start; the folder this makes beside the other caches is read in one.
"""

import hashlib
import struct
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from lora_cli.errors import LoraError
from lora_cli.run import atomic

# Its bar runs four seconds at most, once, and fills logs with a line for each tensor; `unpack` says what it does.
modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)


def unpack(file: Path, *, dtype: torch.dtype, cache: Path, say: Callable[[str], None], weights: bool = True) -> Path:
    """The folder of model, config and tokenizer in `file`, its weights dequantised to `dtype`; made if need be.

    Without `weights` a folder of config and tokenizer will do, which reads no tensor; the whole one, where it is there.

    Raises:
        LoraError: the `gguf` package is missing, or the file is not a GGUF that transformers can read.
    """
    name = str(dtype).removeprefix("torch.")
    folder = _place(file, name, cache)
    if not folder.is_dir() and not weights:
        folder = _place(file, "no weights", cache)
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise LoraError(f"{file}: reading GGUF needs the package gguf", hint='pip install "lora-cli[gguf]"')
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise LoraError(
                f"{file}: not a GGUF file", hint="model.path takes a .gguf file, a local folder or a hub id"
            )
    doing = f"dequantising {file.name} to {name}" if weights else f"reading config and tokenizer of {file.name}"
    say(f"{doing}, once; kept in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = _read(file, dtype if weights else None)
    try:
        with atomic.folder(folder) as partial:
            for part in parts:
                part.save_pretrained(partial)
    except OSError:
        # Two runs may make it at once: the first to finish wins, the other uses what is there.
        if not folder.is_dir():
            raise
    return folder


def _place(file: Path, kind: str, cache: Path) -> Path:
    stat = file.stat()
    identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{kind}|{version('transformers')}"
    return cache / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _read(file: Path, dtype: torch.dtype | None) -> list[Any]:
    """Tokenizer and model, or without a dtype, tokenizer and config: all have save_pretrained."""
    where, what = str(file.parent), {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **what)
        if dtype is None:
            return [AutoConfig.from_pretrained(where, **what), tokenizer]
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **what
        )
    except (struct.error, IndexError) as reason:  # of the reader, past the end of the file
        raise _cut_short(file) from reason
    except (ValueError, NotImplementedError, KeyError) as reason:
        if "reshape" in str(reason):  # of the reader's array of a tensor, past the end of the file
            raise _cut_short(file) from reason
        raise LoraError(
            f"{file}: transformers cannot read this GGUF: {str(reason).splitlines()[0]}",
            hint="use the model's original (safetensors) folder or hub id as model.path",
        ) from reason
    model.config.name_or_path = file.stem
    return [model, tokenizer]


def _cut_short(file: Path) -> LoraError:
    return LoraError(
        f"{file}: transformers cannot read this GGUF: the file is cut short",
        hint="fetch it again, or use the model's original (safetensors) folder or hub id as model.path",
    )
