"""The bytes of a base's weights in memory, exact, from its modules on the meta device: plain, 4-bit and int8 weights.

With bitsandbytes, a 4-bit weight has codes of half a byte, and one fp32 scale per 64 weights; with double quantization,
scales of one byte, with an fp32 scale per 256 of them (QLoRA, arXiv:2305.14314, section 3). An int8 weight has one fp32
scale for each output (LLM.int8, arXiv:2208.07339, section 2).
"""

from math import ceil
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_cli.model.experts import BLOCK_SIZE, expert_weights, is_packable
from lora_cli.model.multimodal import is_inside, outside_text
from lora_cli.model.quantize_experts import unquantized_modules
from lora_cli.recipe.schema import QuantizationSpec

SCALES_PER_SCALE = 256  # of double quantization
NESTED_BYTES = 4 * 256 + 4  # of double quantization, for each weight: a table of 256 values and the mean of the scales


class WeightBytes(NamedTuple):
    """Bytes of some of a base's weights."""

    plain: int = 0  # of weights that are not quantized, in the dtype of the base
    codes: int = 0  # of quantized weights
    constants: int = 0  # of their scales

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self)

    @property
    def stored(self) -> int:
        """Return the bytes without scales."""
        return self.plain + self.codes


class Rows(NamedTuple):
    """A weight as it is stored, without scales: it is sharded by its first dimension."""

    number: int
    size: int  # bytes of one

    def part(self, processes: int) -> int:
        """Return the bytes that each of `processes` has: FSDP2 fills up the parts that have fewer rows, or none."""
        return ceil(self.number / processes) * self.size


class StoredWeights(NamedTuple):
    """Bytes of a base's weights, by place."""

    layers: tuple[WeightBytes, ...]  # of each decoder layer
    outside: WeightBytes  # embeddings, output head, towers that text does not pass through, ...
    largest: int  # weights of the largest quantized layer, or of its largest expert; 0 without quantization
    tensors: tuple[tuple[Rows, ...], ...]  # of each decoder layer

    @property
    def whole(self) -> WeightBytes:
        """Return the bytes of all weights."""
        return WeightBytes(*map(sum, zip(self.outside, *self.layers, strict=True)))


def stored_weights(
    model: PreTrainedModel, *, dtype: torch.dtype, quantization: QuantizationSpec | None
) -> StoredWeights:
    """Count the bytes of the weights of `model`; tied weights count once.

    Args:
        model: the unquantized base, without an adapter; may be on the meta device.
        dtype: of weights that are not quantized.
        quantization: the recipe's section; None for a 16-bit or fp32 base.
    """
    quantized = {} if quantization is None else quantized_sizes(model, quantization)
    layers = list(text_layers(model))
    found: dict[str, WeightBytes] = {}
    tensors: dict[str, list[Rows]] = {name: [] for name in layers}
    for name, parameter in model.named_parameters():
        place = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        if name in quantized:
            assert quantization is not None
            transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            outputs = parameter.shape[1 if transposed else 0]
            own = _quantized_bytes(parameter.numel(), quantization, outputs=outputs)
        else:
            own = WeightBytes(plain=parameter.numel() * dtype.itemsize)
        if place:
            # Codes are sharded one by one; a scalar, which cannot be sharded, is one row.
            rows = own.codes or next(iter(parameter.shape), 1)
            tensors[place].append(Rows(rows, own.stored // rows))
        found[place] = WeightBytes(*map(sum, zip(found.get(place, WeightBytes()), own, strict=True)))
    stacked = expert_weights(model)
    one_by_one = [size // stacked[name].shape[0] if name in stacked else size for name, size in quantized.items()]
    return StoredWeights(
        tuple(found.get(name, WeightBytes()) for name in layers),
        found.get("", WeightBytes()),
        max(one_by_one, default=0),
        tuple(tuple(tensors[name]) for name in layers),
    )


def _quantized_bytes(count: int, spec: QuantizationSpec, *, outputs: int) -> WeightBytes:
    if spec.bits == 8:
        return WeightBytes(codes=count, constants=4 * outputs)
    blocks = ceil(count / BLOCK_SIZE)
    scales = blocks + 4 * ceil(blocks / SCALES_PER_SCALE) + NESTED_BYTES if spec.double_quant else 4 * blocks
    return WeightBytes(codes=ceil(count / 2), constants=scales)


def quantized_sizes(model: PreTrainedModel, quantization: QuantizationSpec) -> dict[str, int]:
    """Return the number of weights of each parameter that loading with `quantization` quantizes, by full name.

    Left out are those of `unquantized_modules`, and subclasses of torch's linear layer, but Falcon's are plain ones by
    then. With 4 bits, the stacked weights of experts are packed too.
    """
    left_out = unquantized_modules(model)
    sizes = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) in (nn.Linear, FalconLinear) or isinstance(module, Conv1D))
        and should_convert_module(name, left_out)
    }
    if quantization.bits == 4:
        weights = expert_weights(model).items()
        sizes |= {name: weight.shape.numel() for name, weight in weights if is_packable(weight.shape)}
    return sizes


def text_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder layers of `model`, those that can be recomputed, by full name, without those of towers."""
    towers = [part.name for part in outside_text(model)]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not is_inside(name, (*towers, *found)):
            found[name] = module
    return found
