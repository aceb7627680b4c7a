"""The memory of a recipe's training step: the estimates of `model/memory.py` for the model and the rows of a run."""

from peft import PeftModel

from lora_cli.model.activation_memory import TrainingSetup, score_width
from lora_cli.model.memory import TrainingMemory, training_memory
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.schema import QuantizationSpec, Recipe
from lora_cli.setup.inputs import RunInputs
from lora_cli.training.optimizer import state_bytes, trained_shapes


def memory_of_run(recipe: Recipe, inputs: RunInputs, model: PeftModel, *, optimizer: str) -> TrainingMemory:
    """Count what training of `model`, with the adapter, takes on the device of `inputs`.

    `model` may be on the meta device. `optimizer` is its resolved name.
    """
    setup = TrainingSetup(
        dtype=inputs.base.dtype,
        packed=bool(recipe.data.packing),
        on_cpu=inputs.device.type == "cpu",
        scores=score_width(inputs.data.train.lengths.tolist()),
        fused=len(inputs.compute_dtypes) == 1 and (recipe.quantization is None or recipe.quantization.bits == 4),
    )
    weights = stored_weights(
        inputs.base.skeleton(),  # not `model`, whose layers are those of the adapter, and may be quantized
        dtype=inputs.base.dtype,
        quantization=_quantization(recipe, inputs),
    )
    state = state_bytes(optimizer, trained_shapes(model))
    return training_memory(model, setup, weights=weights, optimizer_bytes=state, paged=optimizer.startswith("paged"))


def _quantization(recipe: Recipe, inputs: RunInputs) -> QuantizationSpec | None:
    """Return how the base's weights are quantized, by the recipe or before; of the latter, the scales are not known."""
    if inputs.prequantized is None:
        return recipe.quantization
    bits = inputs.prequantized.bits
    if bits not in (4, 8):
        return None
    return QuantizationSpec.model_validate({"bits": bits, **({"double_quant": False} if bits == 4 else {})})
