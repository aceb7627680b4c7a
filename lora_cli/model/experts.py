"""Mixture of experts: find the stacked expert weights and routers of a model, and store the weights in 4 bits.

transformers 5 stores the weights of all experts of a layer in one parameter [experts, out, in] (gpt-oss and Llama 4:
[experts, in, out]), such as `model.layers.0.mlp.experts.gate_up_proj`. Quantizers of linear layers pass them over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import bitsandbytes.functional as bnbf
import torch
from torch import Tensor, nn

BLOCK_SIZE = 64  # weights that share one scale
ORDER = "parameter_order"  # attribute of a module with packed weights: the names of its parameters, in their order
SUFFIX = "_4bit"  # of the submodule that replaces a parameter: `gate_up_proj_4bit`


class PackedWeight(nn.Module):
    """The 4-bit codes and scales of a stacked expert weight, in place of the parameter.

    The codes are those of bitsandbytes for the flattened weight: blocks continue across the ends of rows, because for
    rows that are not a multiple of the block size, its CPU kernels apply the scales of other blocks.
    """

    codes: nn.Parameter

    def __init__(
        self, weight: Tensor, *, quant_type: str, double_quant: bool, compute_dtype: torch.dtype, storage: torch.dtype
    ) -> None:
        """Pack `weight` [experts, rows, columns] of a floating dtype, on its device.

        Args:
            weight: of all experts.
            quant_type: nf4 or fp4.
            double_quant: whether the scales are quantized too.
            compute_dtype: of the matrix products.
            storage: dtype that the codes are viewed in; FSDP needs the dtype of the other weights.
        """
        super().__init__()
        self.shape, self.dtype, self.compute_dtype = weight.shape, weight.dtype, compute_dtype
        codes, self.quant_state = bnbf.quantize_4bit(
            weight.contiguous().view(-1), quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
        )
        self.codes = nn.Parameter(codes, requires_grad=False)
        cast(Any, self.codes).quant_state = self.quant_state  # where Params4bit of bitsandbytes has it too

    def scales(self) -> Tensor:
        """Return the scale of each block, fp32 [weights / 64]."""
        state = self.quant_state
        scales: Tensor = state.absmax
        if state.nested:
            scales = bnbf.dequantize_blockwise(scales, state.state2) + state.offset
        return scales.float()

    def expert(self, index: int, scales: Tensor) -> Tensor:
        """Return the weight of one expert, [rows, columns] in the compute dtype; `scales` are those of `scales()`."""
        size = self.shape[1] * self.shape[2]
        state, blocks = self.quant_state, size // BLOCK_SIZE
        part = bnbf.QuantState(
            absmax=scales[index * blocks : (index + 1) * blocks],
            shape=torch.Size((size,)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        codes = self.codes.data.view(torch.uint8).view(-1, 1)[index * size // 2 : (index + 1) * size // 2]
        weight: Tensor = bnbf.dequantize_4bit(codes, part)
        return weight.view(self.shape[1:]).to(self.compute_dtype)  # rounded as when it was read, like a linear layer

    def dense(self) -> Tensor:
        """Return the weights of all experts, [experts, rows, columns] in the compute dtype."""
        weight: Tensor = bnbf.dequantize_4bit(self.codes.data.view(torch.uint8).view(-1, 1), self.quant_state)
        return weight.view(self.shape).to(self.compute_dtype)

    def placeholder(self) -> nn.Parameter:
        """Return a parameter of the shape and dtype of the weight, without memory."""
        empty = torch.zeros((), dtype=self.dtype, device=self.codes.device)
        return nn.Parameter(empty.expand(self.shape), requires_grad=False)


class ExpertWeight(NamedTuple):
    """A stacked expert weight of a model."""

    module: nn.Module  # its owner
    parameter: str  # its name there
    shape: torch.Size  # [experts, rows, columns]
    packed: bool  # in 4 bits


def expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """Return the stacked expert weights of `model`, packed or not, by the full name of the parameter.

    These are the 3-D parameters of modules whose class or name says expert; biases of experts are 2-D. Adapters on the
    model do not change the names.
    """
    found: dict[str, ExpertWeight] = {}
    for full_path, module in model.named_modules():
        path = full_path.replace(".base_layer", "")
        if "expert" not in f"{type(module).__name__}.{path}".lower():
            continue
        for name, child in module.named_children():
            if isinstance(child, PackedWeight):
                found[f"{path}.{name.removesuffix(SUFFIX)}"] = ExpertWeight(
                    module, name.removesuffix(SUFFIX), child.shape, packed=True
                )
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.is_floating_point():
                found[f"{path}.{name}"] = ExpertWeight(module, name, parameter.shape, packed=False)
    return found


def is_packable(shape: torch.Size) -> bool:
    """Return whether each expert of a weight [experts, rows, columns] is a whole number of blocks."""
    return len(shape) == 3 and shape[1] * shape[2] % BLOCK_SIZE == 0


def packed_weight(module: nn.Module, parameter: str) -> PackedWeight | None:
    """Return the packed form of a parameter of an experts module; None if it is not packed."""
    child = module._modules.get(parameter + SUFFIX)
    return child if isinstance(child, PackedWeight) else None


def pack(module: nn.Module, parameter: str, packed: PackedWeight) -> None:
    """Add `packed` to `module` in place of the parameter's values; the parameter becomes a placeholder."""
    module.add_module(parameter + SUFFIX, packed)
    module._parameters[parameter] = packed.placeholder()


def remove_placeholders(model: nn.Module) -> None:
    """Remove the parameters whose values are packed: they would be counted, saved, and sent to other processes."""
    for module in _packed_modules(model):
        module.__dict__[ORDER] = [*module._parameters]
        for name in [name for name in module._parameters if packed_weight(module, name)]:
            del module._parameters[name]


def _packed_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(isinstance(child, PackedWeight) for child in m.children())]


@contextmanager
def placeholders(model: nn.Module) -> Iterator[None]:
    """Context manager in which packed weights have a parameter of their name and shape, where PEFT looks for it."""
    for module in _packed_modules(model):
        # The order of parameters decides how PEFT nests its layers, and so the names in the adapter file.
        for name in module.__dict__.get(ORDER, ()):
            packed = packed_weight(module, name)
            module._parameters[name] = packed.placeholder() if packed else module._parameters.pop(name)
    try:
        yield
    finally:
        remove_placeholders(model)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that choose the experts of a token, by full name: linear layers, or modules with a weight."""
    has_experts = {name.rpartition(".")[0].rpartition(".")[0] for name in expert_weights(model)}
    found = {}
    for full_path, module in model.named_modules():
        path = full_path.replace(".base_layer", "")
        if ".lora_" in path:
            continue
        parent, _, last = path.rpartition(".")
        weight = module._parameters.get("weight")
        if weight is None or (weight.ndim != 2 and not hasattr(weight, "quant_state")):
            continue
        named = "router" in type(module).__name__.lower() or "router" in path.lower().split(".")
        if named or (last == "gate" and parent in has_experts):
            found[path] = module
    return found


def router_names(model: nn.Module) -> list[str]:
    """Return the names that routers have as targets of an adapter: of the layer, or of the weight of other modules."""
    return [name if isinstance(module, nn.Linear) else f"{name}.weight" for name, module in routers(model).items()]


def linear_names(model: nn.Module) -> list[str]:
    """Return the full names of the linear layers that have no adapter, routers left out."""
    routing = routers(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and ".base_layer" not in name and name not in routing
    ]
