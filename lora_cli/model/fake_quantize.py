"""What quantisation makes of a base's weights: the numbers that an adapter was trained over, as whole weights again."""

from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.model.quantize import bnb_config
from lora_cli.recipe.schema import QuantizationSpec


def quantized_weights(skeleton: PreTrainedModel, spec: QuantizationSpec) -> dict[str, bool]:
    """Names of the weights that transformers would load quantised, and whether it turns each around (Conv1D).

    `skeleton` is on the meta device, and is used up: its linear layers are replaced.
    """
    turned = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    quantizer = AutoHfQuantizer.from_config(bnb_config(spec))
    quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
    layers = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = (name for name, module in skeleton.named_modules() if isinstance(module, layers))
    return {f"{name}.weight": name in turned for name in found}


def quantize_dequantize(spec: QuantizationSpec, dtype: torch.dtype, *, turned: bool) -> Callable[[Tensor], Tensor]:
    """A function from a weight as it is stored to the weight that training computed with, in `dtype`.

    Args:
        spec: the recipe's section.
        dtype: that the base was loaded in.
        turned: whether the layer keeps its weight transposed.
    """

    def apply(weight: Tensor) -> Tensor:
        given = weight.to(dtype)
        given = given.T.contiguous() if turned else given.contiguous()
        value = _round_int8(given) if spec.bits == 8 else _round_4bit(given, spec)
        return value.T.contiguous() if turned else value

    return apply


def _round_4bit(weight: Tensor, spec: QuantizationSpec) -> Tensor:
    # As one row: blocks run on from row to row, and the CPU kernel (0.50) gives those of a row that is no whole number
    # of them the scales of others.
    row = weight.reshape(-1)
    codes, state = bnbf.quantize_4bit(row, quant_type=spec.type, compress_statistics=spec.double_quant)
    value: Tensor = bnbf.dequantize_4bit(codes, state)
    return value.reshape(weight.shape)


def _round_int8(weight: Tensor) -> Tensor:
    codes, scales, _ = bnbf.int8_vectorwise_quant(weight.to(torch.float16))
    value: Tensor = bnbf.int8_vectorwise_dequant(codes, scales)
    return value.to(weight.dtype)
