"""Limits on what a config can make transformers build, found before any memory is used: modules and parameters."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lora_cli.errors import LoraError
from lora_cli.model.safetensors_header import DTYPE_BITS, StoredTensor

MAX_MODULES = 250_000  # the largest published models, with a module for each of their experts, have some 100,000
SMALL_MODEL = 10**8  # parameters that always fit: a head of the task, in the smallest models


@contextmanager
def limited_modules(path: str, *, hint: str) -> Iterator[None]:
    """Stop the construction of a model in the block when it has more modules than any real one.

    Raises:
        LoraError: it has; `path` is the model's, for the message.
    """
    count = 0

    def count_module(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise LoraError(
                f"model.path: {path}: its config.json describes more than {MAX_MODULES:,} modules", hint=hint
            )

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        handle.remove()


def check_parameters(model: nn.Module, stored: int, path: str, *, part: str, hint: str) -> None:
    """Compare the size of a model on the meta device with that of its checkpoint.

    transformers allocates and initializes what the checkpoint lacks before it reports it.

    Args:
        model: built from the config, unquantized.
        stored: numbers that the checkpoint's files have, see `stored_parameters`.
        path: of the checkpoint.
        part: what describes the model: `config.json`.
        hint: of the error.

    Raises:
        LoraError: the model is larger by far.
    """
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * stored + SMALL_MODEL:
        raise LoraError(
            f"{path}: its {part} describes {described:,} parameters, but its files have {stored:,}", hint=hint
        )


def stored_parameters(tensors: Mapping[str, StoredTensor], *, quantized: bool) -> int:
    """Return the number of parameters that a checkpoint can have: packed formats have at least one bit for each."""
    return sum(math.prod(tensor.shape) * (DTYPE_BITS[tensor.dtype] if quantized else 1) for tensor in tensors.values())
