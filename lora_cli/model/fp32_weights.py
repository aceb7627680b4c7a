"""Keep trainable parameters in fp32 while layers compute in bf16/fp16, under the names PEFT expects (parametrizations).

A parametrization of torch computes `layer.weight` from the fp32 tensor at each use, and gradients flow through it.
AdamW's small updates would be rounded away in bf16, and PEFT's layers compute in the dtype of their weights.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from lora_cli.model.fused_lora import is_fusable


class CastTo(nn.Module):
    """Parametrization that casts a tensor to another dtype; the tensor is saved uncast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, original: Tensor) -> Tensor:
        return original.to(self.dtype)


class RowScale(nn.Module):
    """Parametrization diag(s)·B: a trained factor for each output row, initially 1. B is [out, rank], s is [out]."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(rows))

    def forward(self, b: Tensor) -> Tensor:
        return self.scale[:, None] * b


class ConcatFrozen(nn.Module):
    """Parametrization that appends a constant tensor to the trained one along `dim`."""

    constant: Tensor

    def __init__(self, constant: Tensor, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("constant", constant)

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.constant], dim=self.dim)


def parametrize(module: nn.Module, name: str, through: nn.Module) -> None:
    """Register `through` as parametrization of `module.name`."""
    # unsafe: torch would compute it once to compare shape and dtype, which may change here.
    torch_parametrize.register_parametrization(module, name, through, unsafe=True)


def upcast_trainable_params(model: nn.Module, *, for_inference: bool = False) -> None:
    """Keep every trained tensor in fp32, and have LoRA's A and B computed in the dtype of their layer.

    Call it after all adapters are loaded. Fused LoRA layers (while gradients are enabled) and the layers of PEFT's
    other methods cast in their forward. `for_inference` casts in fused layers too, which then run PEFT's forward.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and (for_inference or not is_fusable(module)):
            _cast_lora(module)
        elif isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            for part in list(module.modules()):
                _upcast_own(part)
            if isinstance(module, ModulesToSaveWrapper):
                # PEFT's own method needs the parametrizations' names, which `saved_state_dict` replaces. PEFT has no
                # official hook for this.
                module.adapter_state_dict = partial(_adapter_state_dict, module)
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            _upcast(module, "bias")


def _cast_lora(layer: LoraLayer) -> None:
    dtype = compute_dtype(layer.get_base_layer())
    if layer.lora_variant:  # DoRA: PEFT computes its row norms in the dtype of A and B, and bf16 has too few digits
        return
    if dtype in (None, torch.float32, torch.float64):
        return
    for part in (*layer.lora_A.values(), *layer.lora_B.values()):
        if isinstance(part, nn.Linear) and part.weight.dtype == torch.float32:
            parametrize(part, "weight", CastTo(dtype))


def _adapter_state_dict(_: ModulesToSaveWrapper, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the saved tensors of a fully trained module, in place of PEFT's method of that name."""
    prefix = f"modules_to_save.{adapter_name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _upcast_own(module: nn.Module) -> None:
    for name in [name for name, p in module._parameters.items() if p is not None and p.requires_grad]:
        _upcast(module, name)


def _upcast(module: nn.Module, name: str) -> None:
    parameter: nn.Parameter = getattr(module, name)
    if parameter.dtype in (torch.float16, torch.bfloat16):
        dtype = parameter.dtype
        parameter.data = parameter.data.float()
        parametrize(module, name, CastTo(dtype))


def compute_dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype that a base layer multiplies in; None if its weights do not show it."""
    declared = getattr(layer, "compute_dtype", None)  # Linear4bit
    if isinstance(declared, torch.dtype):
        return declared
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def saved_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return `model.state_dict()` under the names of a model without parametrizations, for saving.

    A tensor with a CastTo is the fp32 tensor itself, sharing memory with the parameter; row factors and constant parts
    are computed into their tensor. Shapes are those of the layers, dtypes those of the stored tensors.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        for tensor_name, value in _computed_tensors(module):
            prefix = f"{name}.parametrizations.{tensor_name}."
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
            state[f"{name}.{tensor_name}"] = value
    return state


def _computed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, chain in _parametrizations(module).items():
        value: Tensor = chain.original.detach()
        for step in chain:
            if not isinstance(step, CastTo):
                value = step(value).detach()
        yield name, value


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """Return the module's own parametrizations; attribute access would also find those inside PEFT's wrappers."""
    return dict(cast(nn.ModuleDict, module._modules.get("parametrizations") or {}).items())


def remove_parametrizations(model: nn.Module) -> None:
    """Replace every parametrized tensor by its computed value; the fp32 tensors are lost."""
    for module in list(model.modules()):
        for name in _parametrizations(module):
            value = getattr(module, name).detach()
            torch_parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
