"""Trained tensors held in fp32 under the name that PEFT knows them by, whatever their layer computes with.

A parametrization of torch stands between the two: `layer.weight` is computed from the held tensor at each use, and
gradients flow through. AdamW's small updates would be rounded away in bf16, and PEFT's layers compute in the dtype
that their weights have: so weights are held in fp32 and show themselves in the dtype of the layer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize


class CastTo(nn.Module):
    """Shows a tensor in another dtype; what is saved is the tensor as it is held."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, held: Tensor) -> Tensor:
        return held.to(self.dtype)


class RowScale(nn.Module):
    """diag(s)·B: one trained factor for each output row, 1 at first. B is [out, rank], s is [out]."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(rows))

    def forward(self, b: Tensor) -> Tensor:
        return self.scale[:, None] * b


class ConcatFrozen(nn.Module):
    """The trained tensor with a constant one beside it along `dim`."""

    constant: Tensor

    def __init__(self, constant: Tensor, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("constant", constant)

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.constant], dim=self.dim)


def parametrize(module: nn.Module, name: str, through: nn.Module) -> None:
    """From now on `module.name` is what `through` makes of the tensor that it was."""
    # unsafe: PyTorch would compute it once to compare shape and dtype, which may well change.
    torch_parametrize.register_parametrization(module, name, through, unsafe=True)


def upcast_trainable_params(model: nn.Module) -> None:
    """Hold every trained tensor in fp32, and let LoRA's A and B be computed in the dtype of their layer.

    Call it once all adapters are on; layers that the fused forward has taken over cast by themselves, and so do the
    layers of PEFT's other methods.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and "forward" not in module.__dict__:
            _cast_lora(module)
        elif isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            for part in list(module.modules()):
                _upcast_own(part)
            if isinstance(module, ModulesToSaveWrapper):
                module.adapter_state_dict = partial(_by_prefix, module)
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            _upcast(module, "bias")


def _cast_lora(layer: LoraLayer) -> None:
    dtype = compute_dtype(layer.get_base_layer())
    if layer.lora_variant:  # DoRA: PEFT takes its row norms in the dtype of A and B, and bf16 has too few digits
        return
    if dtype in (None, torch.float32, torch.float64):
        return
    for part in (*layer.lora_A.values(), *layer.lora_B.values()):
        if isinstance(part, nn.Linear) and part.weight.dtype == torch.float32:
            parametrize(part, "weight", CastTo(dtype))


def _by_prefix(_: ModulesToSaveWrapper, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of a module trained whole; PEFT's own would look for the names that parametrizations have."""
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
    """The dtype that a base layer multiplies in; None where its weights do not tell."""
    given = getattr(layer, "compute_dtype", None)  # Linear4bit
    if isinstance(given, torch.dtype):
        return given
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def saved_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` under the names of a model without parametrizations, each tensor as it is to be saved.

    A tensor that only shows itself in another dtype is the held one, in the same memory; where a factor or a constant
    part belongs to it, they are computed into it.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        for tensor_name, value in _computed(module):
            prefix = f"{name}.parametrizations.{tensor_name}."
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
            state[f"{name}.{tensor_name}"] = value
    return state


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, chain in _chains(module).items():
        value: Tensor = chain.original.detach()
        for step in chain:
            if not isinstance(step, CastTo):
                value = step(value).detach()
        yield name, value


def _chains(module: nn.Module) -> dict[str, Any]:
    """The parametrizations of a module itself: PEFT's wrappers answer for what they wrap."""
    return dict(cast(nn.ModuleDict, module._modules.get("parametrizations") or {}).items())


def remove_parametrizations(model: nn.Module) -> None:
    """Replace every held tensor by what it shows; its fp32 form is lost."""
    for module in list(model.modules()):
        for name in _chains(module):
            shown = getattr(module, name).detach()
            torch_parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(shown, requires_grad=False))
