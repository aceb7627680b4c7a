"""What a run's recipe and base say about the memory of its steps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_cli.model.prequantized import Prequantized
from lora_cli.recipe.schema import Recipe
from lora_cli.setup import training_memory
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.training_model import adapted_skeleton
from tests.model import families
from tests.support.checkpoints import CPU, checkpoint

BF16, FP32 = torch.bfloat16, torch.float32


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **sections})


def inputs_of(recipe: Recipe, folder: Any, **changes: Any) -> RunInputs:
    rows = SimpleNamespace(lengths=np.array([7, 30]), supervised=np.array([5, 3]))
    data: Any = SimpleNamespace(train=rows)
    family = families.FAMILIES["t5" if recipe.task == "seq2seq-lm" else "llama"]
    config = families.config_of(family)
    base = checkpoint(folder, config=config, task=recipe.task, dtype=changes.pop("dtype", FP32))
    return RunInputs(recipe, CPU, base, data, **{"prequantized": None, **changes})


@pytest.mark.parametrize(
    ("quantization", "dtype", "existing", "unfused"),
    [
        (None, BF16, None, None),
        ({"bits": 4}, BF16, None, None),
        ({"bits": 4, "compute_dtype": "bfloat16"}, FP32, None, BF16),
        ({"bits": 8}, BF16, None, FP32),
        (None, BF16, Prequantized("bitsandbytes", 4), None),
        (None, BF16, Prequantized("bitsandbytes", 8), FP32),
        (None, BF16, Prequantized("gptq", 4), FP32),
    ],
)
def test_the_dtype_of_layers_that_do_not_run_as_one_step(
    quantization: dict[str, Any] | None,
    dtype: torch.dtype,
    existing: Prequantized | None,
    unfused: torch.dtype | None,
    tmp_path: Any,
):
    recipe = recipe_of(**({"quantization": quantization} if quantization else {}))
    inputs = inputs_of(recipe, tmp_path, dtype=dtype, prequantized=existing)
    assert training_memory._unfused(recipe, inputs) == unfused


@pytest.mark.parametrize("sections", [{"adapter": {"method": "adalora"}}, {"task": "seq2seq-lm"}])
def test_the_memory_of_a_run_is_that_of_its_shapes(sections: dict[str, Any], tmp_path: Any):
    """AdaLoRA refuses to be attached for a few steps; the target of an encoder-decoder has a length of its own."""
    recipe = recipe_of(**sections)
    inputs = inputs_of(recipe, tmp_path)
    memory = training_memory.memory_of_run(recipe, inputs, adapted_skeleton(recipe, inputs), optimizer="adamw")
    assert not memory.activations.unmeasured
    assert memory.plan(60).activations > memory.plan(30).activations > 0
    inputs.data.train.supervised[0] = 50
    longer = training_memory.memory_of_run(recipe, inputs, adapted_skeleton(recipe, inputs), optimizer="adamw")
    more = longer.plan(60).activations > memory.plan(60).activations
    assert more is (recipe.task == "seq2seq-lm")
