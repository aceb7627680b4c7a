"""Fake quantization: base weights and layers without packed weights that compute what the adapter saw in training."""

from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from lora_cli.model.device import resolve_compute_dtype
from lora_cli.model.quantize import bnb_config
from lora_cli.model.quantize_experts import packable_weights
from lora_cli.recipe.schema import QuantizationSpec

OUTLIER_THRESHOLD = 6.0  # LLM.int8: larger inputs are outliers; the default of transformers
PART_WEIGHTS = 1 << 20  # of a weight that are quantized at a time: a multiple of the block size


def quantized_weights(
    skeleton: PreTrainedModel, spec: QuantizationSpec, *, in_training: bool = True
) -> dict[str, bool]:
    """Return the names of the weights that are quantized, and whether each is stored transposed (Conv1D).

    Args:
        skeleton: the base on the meta device. Do not use it afterwards: its linear layers are replaced.
        spec: the quantization.
        in_training: include what transformers alone does not quantize: the stacked weights of experts, and Falcon's
            linear layers.
    """
    transposed = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    stacked = packable_weights(skeleton) if spec.bits == 4 and in_training else []
    config = bnb_config(spec, torch.float32)
    if in_training:
        quantizer = AutoHfQuantizer.from_config(config)
    else:
        quantizer = (Bnb4BitHfQuantizer if spec.bits == 4 else Bnb8BitHfQuantizer)(config)
    quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
    layers = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    quantized = (name for name, module in skeleton.named_modules() if isinstance(module, layers))
    return {f"{name}.weight": name in transposed for name in quantized} | dict.fromkeys(stacked, False)


def quantize_dequantize(
    spec: QuantizationSpec, dtype: torch.dtype, *, transposed: bool, exact: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return a function from a stored weight to the weight that training computed with.

    The function takes a floating-point weight of any dtype, 2-D or of stacked experts (3-D), and returns the same shape
    in `dtype`.

    Args:
        spec: the recipe's quantization section.
        dtype: of the base in training.
        transposed: whether the layer stores its weight as [in, out] (Conv1D), not [out, in].
        exact: return 8-bit values in fp32, which has all their digits.
    """

    def apply(weight: Tensor) -> Tensor:
        """Return `weight` [out, in], or [in, out] if transposed, after quantization: the same shape, in `dtype`."""
        weight = weight.to(dtype)
        weight = weight.T.contiguous() if transposed else weight.contiguous()
        value = _fake_quantize_4bit(weight, spec) if spec.bits == 4 else _fake_quantize_int8(weight)
        value = value if exact else value.to(dtype)
        return value.T.contiguous() if transposed else value

    return apply


def compute_as_quantized(layer: nn.Module, spec: QuantizationSpec, dtype: torch.dtype) -> torch.dtype:
    """Have a linear layer compute as its quantized form does on a weight that was quantized and dequantized.

    In 4 bits, the product is computed in the compute dtype. In 8 bits, the inputs are rounded to 8 bits too, except the
    columns with an outlier (LLM.int8, Dettmers et al., arXiv:2208.07339, section 3); the product is exact.

    Args:
        layer: of a model in `dtype`.
        spec: the quantization.
        dtype: of its outputs.

    Returns:
        The dtype that its weight and bias must have.
    """
    compute_dtype: torch.dtype = torch.float32 if spec.bits == 8 else resolve_compute_dtype(spec, dtype)

    def change_inputs(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_fake_quantize_inputs(args[0]) if spec.bits == 8 else args[0].to(compute_dtype), *args[1:])

    def change_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(dtype)

    layer.register_forward_pre_hook(change_inputs)
    layer.register_forward_hook(change_output)
    return compute_dtype


def _fake_quantize_inputs(x: Tensor) -> Tensor:
    """Return x [..., in] as the layers of LLM.int8 see it, in fp32."""
    flat = x.reshape(-1, x.shape[-1])
    codes, scales, outliers = bnbf.int8_vectorwise_quant(flat.to(torch.float16), threshold=OUTLIER_THRESHOLD)
    value: Tensor = bnbf.int8_vectorwise_dequant(codes, scales)
    if outliers is not None:
        value[:, outliers] = flat[:, outliers].float()
    return value.view(x.shape)


def _fake_quantize_4bit(weight: Tensor, spec: QuantizationSpec) -> Tensor:
    # Flattened to one row, because blocks continue across row ends: for rows that are not a multiple of the block size,
    # the CPU kernel (bitsandbytes 0.50) would apply the scales of other blocks.
    # In parts, because the functions take 20 bytes for each weight; only the scales are quantized all together.
    parts = weight.reshape(-1).split(PART_WEIGHTS)
    quantized = [bnbf.quantize_4bit(part, quant_type=spec.type, compress_statistics=False) for part in parts]
    scales = torch.cat([state.absmax for _, state in quantized])
    if spec.double_quant:
        offset = scales.mean()
        codes, state_of_scales = bnbf.quantize_blockwise(scales - offset, blocksize=256)
        scales = bnbf.dequantize_blockwise(codes, state_of_scales) + offset
    value = weight.new_empty(weight.numel())
    sizes = [len(state.absmax) for _, state in quantized]
    for (codes, state), own, target in zip(quantized, scales.split(sizes), value.split(PART_WEIGHTS), strict=True):
        state.absmax = own
        target.copy_(bnbf.dequantize_4bit(codes, state).view(-1))
    return value.reshape(weight.shape)


def _fake_quantize_int8(weight: Tensor) -> Tensor:
    codes, scales, _ = bnbf.int8_vectorwise_quant(weight.to(torch.float16))
    value: Tensor = bnbf.int8_vectorwise_dequant(codes, scales)
    return value
