"""The recipe's quantization section as bitsandbytes takes it, and the base made ready for training on it."""

from typing import Any, cast

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import QuantizationSpec

BLOCK = 64  # weights that share a scale


def library_config(spec: QuantizationSpec) -> BitsAndBytesConfig:
    """QLoRA's storage (Dettmers et al., arXiv:2305.14314, section 3): 4-bit codes, scales quantised too; or int8."""
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a quantised base and put all that is not quantised in fp32; checkpointing is the loop's to switch."""
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return cast(PreTrainedModel, prepared)


def guard_cpu(model: PreTrainedModel) -> None:
    """Keep two faults of bitsandbytes' CPU kernels (0.50) out of the results; nothing to do on a GPU.

    At the first forward in eval mode on a CPU with AVX512-BF16 it packs 4-bit weights anew, for good, and the product
    with packed weights has no backward: training after an evaluation would pass no gradient through the base,
    silently. And where a row of weights is no whole number of blocks, it gives blocks the scales of others.

    Raises:
        LoraError: the model has such rows.
    """
    ragged = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "support_avx512bf16_for_cpu"):  # Linear4bit
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu" and module.in_features % BLOCK:
                ragged[name.rpartition(".")[2]] = module.in_features
    if ragged:
        listed = ", ".join(f"{kind} ({width:,})" for kind, width in ragged.items())
        raise LoraError(
            f"quantization: on the CPU, 4-bit layers take inputs of a multiple of {BLOCK} only; not so: {listed}",
            hint="use a GPU, bits: 8, or leave quantization out",
        )
