"""A GGUF file as base model: kept packed if transformers has a kernel for it, else dequantized once to a cached folder.

transformers reads a GGUF's tokenizer and tensors through Python loops, which take half a minute for a small model at
every start. The cached folder loads in a second. Its weights have the values that llama.cpp dequantizes to. This
project has never trained on packed weights on a GPU. On the CPU, where transformers has no kernel, tests run the packed
layers below with transformers' slow fallback.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.utils import GgufEmbedding, GgufExperts, GgufLinear, is_gguf_arch_supported

from lora_cli.data.cache_versions import gguf_versions
from lora_cli.errors import LoraError
from lora_cli.model import finite
from lora_cli.model.build_limits import check_parameters
from lora_cli.model.gguf_header import FETCH_HINT, MAGIC, GGUFHeader, read_gguf_header
from lora_cli.model.library_errors import library_errors
from lora_cli.run.cache_entry import OTHER_DISK, cached_entry
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.read_file import open_regular

LARGE_FILE = 4 << 30  # bytes: unpacked, its checksums take seconds, or longer on a slow disk
UNPACK_BYTES = 4 << 20  # of packed weights that are dequantized at a time


def unpack_gguf(
    file: Path, *, dtype: torch.dtype, cache: Path, info: Callable[[str], None], weights: bool = True
) -> Path:
    """Return a folder with the model, config and tokenizer of `file`, weights dequantized to `dtype`.

    The folder is created in `cache` on the first call, and again if its files are damaged. If `weights` is False and no
    folder with weights exists, the folder contains only config and tokenizer, and no tensor is read.

    Raises:
        LoraError: the `gguf` package is missing, the file is not a GGUF that transformers can read, or the cache cannot
            be written.
    """
    name = str(dtype).removeprefix("torch.")
    folder = _cache_folder(file, name, cache)
    if not folder.is_dir() and not weights:
        folder = _cache_folder(file, "no weights", cache)

    def unpack(partial: Path) -> None:
        header = read_gguf_header(file)
        action = f"dequantizing {file.name} to {name}" if weights else f"reading config and tokenizer of {file.name}"
        info(f"{action} once; cached in {folder}")
        parts = _read(file, header, dtype if weights else None)
        if weights:
            size = sum(tensor.nbytes for tensor in parts[0].state_dict().values())
            check_free_space([Need(folder, size, f"the unpacked weights of {file.name}")], hint=OTHER_DISK)
        for part in parts:
            part.save_pretrained(partial)

    if weights and folder.is_dir() and file.stat().st_size > LARGE_FILE:
        info(f"verifying the unpacked weights of {file.name}")
    unread = None if weights else ".safetensors"
    return cached_entry(
        folder, make=unpack, what=f"the unpacked {file.name}", versions=gguf_versions(), info=info, unread=unread
    )


def check_gguf_file(file: Path) -> None:
    """Check early that `file` can be read as GGUF.

    Raises:
        LoraError: the `gguf` package is missing, or the file does not start with GGUF's magic bytes.
    """
    if find_spec("gguf") is None:
        raise LoraError(f"{file}: reading GGUF needs the package gguf", hint='pip install "lora-cli[gguf]"')
    with open_regular(file, hint=FETCH_HINT) as start:
        if start.read(4) != MAGIC:
            raise LoraError(
                f"{file}: not a GGUF file", hint="set model.path to a .gguf file, a local folder or a hub id"
            )


def why_not_packed(file: Path, *, device: torch.device) -> str | None:
    """Return the reason why the weights of `file` cannot stay packed on `device`; None if they can.

    transformers multiplies packed weights with a kernel from the hub. It needs a GPU and an architecture that
    transformers' packed GGUF loader supports.
    """
    if device.type == "cpu":
        return "transformers has no kernel for packed weights on the CPU"
    if find_spec("kernels") is None:
        return "the package kernels, which downloads the kernel for packed weights, is not installed"
    architecture = read_gguf_header(file).architecture
    if not is_gguf_arch_supported(architecture):
        return f"transformers loads the architecture {architecture} dequantized only"
    return None


def choose_packed(
    mode: Literal["auto", "packed", "dequantized"], file: Path, *, device: torch.device, info: Callable[[str], None]
) -> bool:
    """Return whether the weights of `file` stay packed, by the recipe's `model.gguf`; report the choice to `info`.

    Raises:
        LoraError: `mode` is packed, but the weights cannot stay packed.
    """
    if mode == "dequantized":
        return False
    reason = why_not_packed(file, device=device)
    if mode == "packed" and reason:
        raise LoraError(
            f"model.gguf: packed is not possible: {reason}",
            hint="set model.gguf to auto or dequantized: the weights have the same values",
        )
    info(f"{file.name}: " + (f"dequantized, because {reason}" if reason else "kept packed"))
    return reason is None


class PackedLora(LoraLinear):  # type: ignore[misc]  # PEFT has no types
    """LoRA on a layer whose weights stay packed: PEFT's own forward adds the update to the packed layer's output."""


def make_packed_layers_differentiable(model: nn.Module) -> None:
    """Make packed layers pass gradients to their input; in place.

    For few rows, their kernel has no backward pass, and gradients would stop there without an error.

    Raises:
        LoraError: the model has packed experts, whose kernel never has a backward pass.
    """
    for name, module in model.named_modules():
        if isinstance(module, GgufExperts):
            raise LoraError(
                f"model.gguf: cannot train with packed experts ({name}): their kernel has no backward pass",
                hint="write model: {gguf: dequantized}",
            )
        if isinstance(module, GgufLinear):
            # Patched on each instance, as transformers has no hook to choose the kernel. PackedLora cannot do this
            # instead: gradients must also pass packed layers without an adapter, to reach adapters in earlier layers.
            module.forward = partial(_packed_forward, module)


def packed_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of packed layers and embeddings, fp32, in parts of some rows each; nothing for other models."""
    for name, module in model.named_modules():
        if isinstance(module, (GgufLinear, GgufEmbedding)):
            for rows in module.weight.split(max(1, UNPACK_BYTES // module.weight.shape[1])):
                yield f"{name}.weight", dequantize(rows, module.ggml_type)


def _packed_forward(layer: GgufLinear, x: Tensor) -> Tensor:
    """Compute `GgufLinear.forward`, [..., in] to [..., out] in the dtype of `x`; differentiable if gradients are on."""
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


def _cache_folder(file: Path, content: str, cache: Path) -> Path:
    stat = file.stat()
    identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{content}|{gguf_versions()['transformers']}"
    return cache / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _read(file: Path, header: GGUFHeader, dtype: torch.dtype | None) -> list[Any]:
    """Load model and tokenizer, or config and tokenizer if `dtype` is None; all of them have save_pretrained."""
    folder, options = str(file.parent), {"gguf_file": file.name}
    with library_errors(str(file), hint=FETCH_HINT):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        config = AutoConfig.from_pretrained(folder, **options)
    if dtype is None:
        return [config, tokenizer]
    _check_size(file, config, header)
    with library_errors(str(file), hint=FETCH_HINT), _no_progress_bar():
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise LoraError(f"{file} has no weights for {missing[0]}", hint=FETCH_HINT)
    if (name := finite.first_not_finite(model.named_parameters())) is not None:
        raise finite.not_finite_error(name, file)
    model.config.name_or_path = file.stem
    return [model, tokenizer]


def _check_size(file: Path, config: PretrainedConfig, header: GGUFHeader) -> None:
    """Raise if the metadata describe a far larger model than the file has tensors of: all of it would be allocated."""
    with library_errors(str(file), part="metadata", hint=FETCH_HINT), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    check_parameters(model, stored, str(file), part="metadata", hint=FETCH_HINT)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disable transformers' progress bar for GGUF tensors, which would write a line for each tensor into a log."""
    # Patches a module global: transformers calls plain tqdm there and has no official switch for this bar.
    original = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(original, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = original
