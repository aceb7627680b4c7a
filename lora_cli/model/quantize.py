"""The recipe's quantization section as bitsandbytes takes it, and the base made ready for training on it."""

from typing import cast

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_cli.recipe.schema import QuantizationSpec


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
    """Freeze a quantised base and put its norms in fp32; checkpointing is the loop's to switch."""
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return cast(PreTrainedModel, prepared)
