"""Work with weights that are sharded over processes (FSDP2): gather one, or give PEFT something in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_cli.model.quantize import BLOCK_SIZE


def is_sharded(model: nn.Module) -> bool:
    """Return whether the base of `model` is sharded: then all processes must run it equally often."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Return whether sharded weights of `model` wait in host memory for a device that is not the CPU."""
    sharded = (parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    return any(parameter.device.type == "cpu" != parameter.device_mesh.device_type for parameter in sharded)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that are whole at a time: two layers, and embeddings, final norm and head."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    sharded = [{p for p in unit.parameters() if isinstance(p, DTensor)} for unit in units]
    layers, ends = [0], 0
    for number, parameters in enumerate(sharded):
        inner = set().union(*(other for other in sharded if other < parameters))
        size = sum(p.numel() * p.itemsize for p in parameters - inner)
        if inner or isinstance(units[number], nn.Linear):
            ends += size
        else:
            layers.append(size)
    return ends + 2 * max(layers)


def free_gathered(model: nn.Module) -> None:
    """Free the weights that a pass left whole, which it does with embeddings and head.

    Call it on all processes after one of them worked on the modules alone: moving or casting modules frees them too,
    and all processes must gather the same weights in the next pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block, the weights of `module` are whole; all processes must enter it. For a module used by weight."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def is_gathered(layer: nn.Module) -> bool:
    """Return whether a linear layer that is sharded has its whole weight now."""
    return isinstance(layer, FSDPModule) and not isinstance(layer.weight, DTensor)


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a layer is torch's linear layer, which has another class where it is sharded."""
    return type(layer) is nn.Linear or (isinstance(layer, FSDPModule) and isinstance(layer, nn.Linear))


def gathered_weight(layer: Any) -> Tensor | None:
    """Return the whole weight [out, in] of a linear layer if it is sharded, dequantized; None if it is not sharded.

    All processes must call it. It is the base's dtype.
    """
    if not isinstance(layer.weight, DTensor):
        return None
    # Only the device of the mesh can gather it, and a weight may wait in host memory.
    sharded: Any = layer.weight.to(_device(layer.weight))
    weight: Tensor = sharded.full_tensor()
    if isinstance(layer, Linear4bit):
        weight = dequantize_4bit(weight, quant_state_of(layer))
    return weight


def _device(parameter: DTensor) -> torch.device:
    """Return the device that a sharded parameter is gathered on; its own part may wait in host memory."""
    return torch.device(parameter.device_mesh.device_type)


def quant_state_of(layer: Any) -> Any:
    """Return the scales of a 4-bit layer: the layer has them where its codes are sharded."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


@contextmanager
def placeholders(model: nn.Module) -> Iterator[None]:
    """Within the block, sharded weights are zeros of their shape, all in the same memory, which PEFT can compute with.

    PEFT creates layers of the device, shape and dtype of the base's weights. DoRA's magnitudes are computed afterwards.
    """
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    zeros: dict[torch.dtype, Tensor] = {}
    for _, _, parameter in sharded:
        known = zeros.get(parameter.dtype)
        if known is None or known.numel() < parameter.numel():
            zeros[parameter.dtype] = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=_device(parameter))
    for module, name, parameter in sharded:
        values = zeros[parameter.dtype][: parameter.numel()].view(parameter.shape)
        if isinstance(module, Linear4bit) and name == "weight":
            state: Any = module.quant_state
            packed = Params4bit(
                values,
                requires_grad=False,
                quant_state=state,
                blocksize=BLOCK_SIZE,
                compress_statistics=state.nested,
                quant_type=state.quant_type,
                bnb_quantized=True,
            )
            setattr(module, name, packed)
        else:
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)
