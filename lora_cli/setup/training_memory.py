"""The memory of a recipe's training step: the estimates of `model/memory.py` for the model and the rows of a run."""

import torch
from peft import PeftModel

from lora_cli.model.activation_memory import TrainingSetup, row_tokens
from lora_cli.model.memory import TrainingMemory, training_memory
from lora_cli.model.prequantized import Prequantized
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.schema import QuantizationSpec, Recipe
from lora_cli.setup.inputs import RunInputs
from lora_cli.training.optimizer import state_bytes, trained_shapes


def memory_of_run(
    recipe: Recipe, inputs: RunInputs, model: PeftModel, *, optimizer: str, attention: str | None = None
) -> TrainingMemory:
    """Count what training of `model`, with the adapter, takes on the device of `inputs`.

    Args:
        recipe: of the run.
        inputs: of the run.
        model: on the meta device.
        optimizer: its resolved name.
        attention: implementation that the loaded base has; None if it is not loaded.
    """
    packed, is_seq2seq = bool(recipe.data.packing), recipe.task == "seq2seq-lm"
    setup = TrainingSetup(
        dtype=inputs.base.dtype,
        packed=packed,
        on_cpu=inputs.device.type == "cpu",
        row=row_tokens(inputs.data.train.lengths.tolist(), packed=packed),
        unfused=_unfused(recipe, inputs),
        attention=attention or recipe.model.attention,
        task=recipe.task,
        target=int(inputs.data.train.supervised.max(initial=0)) if is_seq2seq else 0,
    )
    weights = stored_weights(
        inputs.base.skeleton(),  # not `model`, whose layers are those of the adapter, and may be quantized
        dtype=inputs.base.dtype,
        quantization=_quantization(recipe, inputs),
    )
    state = state_bytes(optimizer, trained_shapes(model))
    return training_memory(model, setup, weights=weights, optimizer_bytes=state, paged=optimizer.startswith("paged"))


def _unfused(recipe: Recipe, inputs: RunInputs) -> torch.dtype | None:
    """Return the dtype of the factors of LoRA layers that do not run as one step; None if they do."""
    existing = inputs.prequantized
    if inputs.base.source.packed:
        return inputs.base.dtype
    if recipe.quantization is not None and recipe.quantization.bits == 4:
        return next(iter(inputs.compute_dtypes - {inputs.base.dtype}), None)
    if recipe.quantization is None and existing in (None, Prequantized("bitsandbytes", 4)):
        return None
    return torch.float32  # PEFT multiplies int8 weights in it, and those of other libraries


def _quantization(recipe: Recipe, inputs: RunInputs) -> QuantizationSpec | None:
    """Return how the base's weights are quantized, by the recipe or before; of the latter, the scales are not known."""
    if inputs.prequantized is None:
        return recipe.quantization
    bits = inputs.prequantized.bits
    if bits not in (4, 8):
        return None
    return QuantizationSpec.model_validate({"bits": bits, **({"double_quant": False} if bits == 4 else {})})
