"""A GGUF base: kept packed where transformers has a kernel that can, else turned into a plain folder, once.

transformers reads a GGUF's vocabulary and tensors through Python loops that take half a minute on a small model,
at every start; the folder this makes beside the other caches is read in one. Its weights are the same numbers as
llama.cpp's, dequantised. Packed weights were never trained over on a GPU by this project: on the CPU, where
transformers has no kernel, tests run the layers below with its slow fallback.
"""

import hashlib
import struct
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import GgufExperts, GgufLinear, is_gguf_arch_supported

from lora_cli.errors import LoraError
from lora_cli.run import atomic

# Its bar runs four seconds at most, once, and fills logs with a line for each tensor; `unpack` says what it does.
modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)


def unpack_gguf(
    file: Path, *, dtype: torch.dtype, cache: Path, info: Callable[[str], None], weights: bool = True
) -> Path:
    """The folder of model, config and tokenizer in `file`, its weights dequantised to `dtype`; made if need be.

    Without `weights` a folder of config and tokenizer will do, which reads no tensor; the whole one, where it is there.

    Raises:
        LoraError: the `gguf` package is missing, or the file is not a GGUF that transformers can read.
    """
    name = str(dtype).removeprefix("torch.")
    folder = _cache_folder(file, name, cache)
    if not folder.is_dir() and not weights:
        folder = _cache_folder(file, "no weights", cache)
    if folder.is_dir():
        return folder
    check_gguf_file(file)
    doing = f"dequantising {file.name} to {name}" if weights else f"reading config and tokenizer of {file.name}"
    info(f"{doing}, once; kept in {folder}")
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


def check_gguf_file(file: Path) -> None:
    """Refuse early what is no GGUF file, or cannot be read here.

    Raises:
        LoraError: the `gguf` package is missing, or the file begins otherwise.
    """
    if find_spec("gguf") is None:
        raise LoraError(f"{file}: reading GGUF needs the package gguf", hint='pip install "lora-cli[gguf]"')
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise LoraError(
                f"{file}: not a GGUF file", hint="model.path takes a .gguf file, a local folder or a hub id"
            )


def why_not_packed(file: Path, *, device: torch.device) -> str | None:
    """Why the weights of `file` cannot stay packed here; None where they can.

    transformers multiplies packed weights by a kernel from the hub, on GPUs, in the architectures that its new loader
    knows.
    """
    if device.type == "cpu":
        return "transformers has no kernel for packed weights on the CPU"
    if find_spec("kernels") is None:
        return "the package kernels, which fetches the kernel for packed weights, is not installed"
    architecture = read_gguf_metadata(str(file))[0]["general.architecture"]
    if not is_gguf_arch_supported(architecture):
        return f"transformers loads the architecture {architecture} dequantised only"
    return None


def choose_packed(
    mode: Literal["auto", "packed", "dequantized"], file: Path, *, device: torch.device, info: Callable[[str], None]
) -> bool:
    """Whether `file` stays packed, as `model.gguf` wants it; what is not obvious is said.

    Raises:
        LoraError: packed is asked for, and cannot be.
    """
    if mode == "dequantized":
        return False
    reason = why_not_packed(file, device=device)
    if mode == "packed" and reason:
        raise LoraError(f"model.gguf: packed, but {reason}", hint="write auto or dequantized: the numbers are the same")
    info(f"{file.name}: " + (f"dequantized, as {reason}" if reason else "kept packed"))
    return reason is None


class PackedLora(LoraLinear):  # type: ignore[misc]  # PEFT has no types
    """LoRA over a layer whose weights stay packed: PEFT's own forward, on what the packed layer computes."""


def register_packed_lora(config: LoraConfig) -> None:
    """Let PEFT put LoRA on packed layers too."""
    config._register_custom_module({GgufLinear: PackedLora})


def make_packed_layers_differentiable(model: nn.Module) -> None:
    """Let gradients pass packed layers: their kernel for a few rows has no backward, and would drop them silently.

    Raises:
        LoraError: the model has packed experts, whose kernel has none for any number of rows.
    """
    for name, module in model.named_modules():
        if isinstance(module, GgufExperts):
            raise LoraError(
                f"model.gguf: packed experts ({name}) cannot be trained over: their kernel has no backward pass",
                hint="write model: {gguf: dequantized}",
            )
        if isinstance(module, GgufLinear):
            module.forward = partial(_packed_forward, module)


def _packed_forward(layer: GgufLinear, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        out: Tensor = GgufLinear.forward(layer, x)
        return out
    flat = x.reshape(-1, layer.in_features)
    if layer.input_permutation is not None:
        flat = flat.index_select(1, layer.input_permutation)
    product: Tensor = layer._unpack_matmul(flat)
    if layer.bias is not None:
        product = product + layer.bias
    return product.reshape(*x.shape[:-1], layer.out_features).to(x.dtype)


def _cache_folder(file: Path, kind: str, cache: Path) -> Path:
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
