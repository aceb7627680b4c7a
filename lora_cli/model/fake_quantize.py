"""Fake quantization: quantize and dequantize base weights, to get the values that the adapter saw in training."""

from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.model.quantize import bnb_config
from lora_cli.model.quantize_experts import packable_weights
from lora_cli.recipe.schema import QuantizationSpec


def quantized_weights(
    skeleton: PreTrainedModel, spec: QuantizationSpec, *, with_experts: bool = True
) -> dict[str, bool]:
    """Return the names of the weights that are quantized in training, and whether each is stored transposed (Conv1D).

    Args:
        skeleton: the base on the meta device. Do not use it afterwards: its linear layers are replaced.
        spec: the quantization.
        with_experts: include the stacked weights of experts, which transformers alone does not quantize.
    """
    transposed = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    stacked = packable_weights(skeleton) if spec.bits == 4 and with_experts else []
    quantizer = AutoHfQuantizer.from_config(bnb_config(spec))
    quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
    layers = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    quantized = (name for name, module in skeleton.named_modules() if isinstance(module, layers))
    return {f"{name}.weight": name in transposed for name in quantized} | dict.fromkeys(stacked, False)


def quantize_dequantize(spec: QuantizationSpec, dtype: torch.dtype, *, transposed: bool) -> Callable[[Tensor], Tensor]:
    """Return a function from a stored weight to the weight that training computed with.

    The function takes a floating-point weight of any dtype, 2-D or of stacked experts (3-D), and returns the same shape
    in `dtype`.

    Args:
        spec: the recipe's quantization section.
        dtype: of the base in training.
        transposed: whether the layer stores its weight as [in, out] (Conv1D), not [out, in].
    """

    def apply(weight: Tensor) -> Tensor:
        """Return `weight` [out, in], or [in, out] if transposed, after quantization: the same shape, in `dtype`."""
        weight = weight.to(dtype)
        weight = weight.T.contiguous() if transposed else weight.contiguous()
        value = _fake_quantize_int8(weight) if spec.bits == 8 else _fake_quantize_4bit(weight, spec)
        return value.T.contiguous() if transposed else value

    return apply


def _fake_quantize_4bit(weight: Tensor, spec: QuantizationSpec) -> Tensor:
    # Flattened to one row, because blocks continue across row ends: for rows that are not a multiple of the block size,
    # the CPU kernel (bitsandbytes 0.50) would apply the scales of other blocks.
    row = weight.reshape(-1)
    codes, state = bnbf.quantize_4bit(row, quant_type=spec.type, compress_statistics=spec.double_quant)
    value: Tensor = bnbf.dequantize_4bit(codes, state)
    return value.reshape(weight.shape)


def _fake_quantize_int8(weight: Tensor) -> Tensor:
    codes, scales, _ = bnbf.int8_vectorwise_quant(weight.to(torch.float16))
    value: Tensor = bnbf.int8_vectorwise_dequant(codes, scales)
    return value.to(weight.dtype)
