"""The counted bytes of weights are those of loaded models: plain, 4-bit and int8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.model.multimodal import is_inside, outside_text
from lora_cli.model.tasks import TASKS
from lora_cli.model.weight_memory import WeightBytes, quantized_sizes, stored_weights
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import multimodal_families, zoo
from tests.model.families import FAMILIES, config_of
from tests.support import checkpoints

BF16 = torch.bfloat16
SPECS = {
    "4 bits": QuantizationSpec.model_validate({"bits": 4}),
    "4 bits, plain scales": QuantizationSpec.model_validate({"bits": 4, "double_quant": False}),
    "8 bits": QuantizationSpec.model_validate({"bits": 8}),
}


def constants_of(state: Any) -> int:
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return sum(tensor.numel() * tensor.element_size() for tensor in (state.absmax, *nested))


def loaded_bytes(model: nn.Module) -> WeightBytes:
    """Count the tensors of a loaded model."""
    plain = codes = constants = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if hasattr(parameter, "quant_state"):
            codes, constants = codes + size, constants + constants_of(parameter.quant_state)
        elif parameter.dtype == torch.int8:
            codes += size
            scales: Any = parameter
            constants += scales.SCB.numel() * scales.SCB.element_size()
        else:
            plain += size
    return WeightBytes(plain, codes, constants)


def norm_values(model: nn.Module) -> int:
    norms = (module for module in model.modules() if type(module).__name__.endswith("Norm"))
    return sum(p.numel() for module in norms for p in module.parameters())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_unquantized_weights_are_the_parameters(family: str):
    model = zoo.make(family)
    stored = stored_weights(model, dtype=BF16, quantization=None)
    assert stored.whole == WeightBytes(plain=2 * sum(p.numel() for p in model.parameters()))
    assert len(stored.layers) == 2
    inside = sum(p.numel() for name, p in model.named_parameters() if ".0." in name or ".1." in name)
    assert sum(layer.total for layer in stored.layers) == 2 * inside


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "qwen2-moe", "llama-classifier", "bert"])
def test_quantized_weights_are_those_of_the_loaded_model(name: str, spec: str, tmp_path: Path):
    family = FAMILIES[name]
    torch.manual_seed(0)
    skeleton = checkpoints.skeleton_of(config_of(family), task=family.task)
    TASKS[family.task].auto_class.from_config(config_of(family)).save_pretrained(tmp_path)
    model = checkpoints.load(tmp_path, dtype=BF16, quantization=SPECS[spec], task=family.task)
    counted = stored_weights(skeleton, dtype=BF16, quantization=SPECS[spec]).whole
    assert counted._replace(plain=0) == loaded_bytes(model)._replace(plain=0)
    # Norms that do not compute in fp32 themselves are stored in fp32.
    assert counted.plain <= loaded_bytes(model).plain <= counted.plain + 2 * norm_values(model)


def test_tied_embeddings_count_once():
    whole, tied = (
        stored_weights(zoo.make(name), dtype=BF16, quantization=None).whole for name in ("llama", "llama-tied")
    )
    assert whole.plain - tied.plain == 2 * zoo.VOCABULARY * zoo.COMMON["hidden_size"]


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "llava"])
def test_a_frozen_vision_tower_counts_outside_of_the_layers(name: str):
    model = checkpoints.skeleton_of(multimodal_families.config_of(multimodal_families.MULTIMODAL[name]))
    towers = [part.name for part in outside_text(model)]
    tower = sum(p.numel() for name, p in model.named_parameters() if is_inside(name, towers))
    stored = stored_weights(model, dtype=BF16, quantization=None)
    assert tower
    assert stored.whole.total == 2 * sum(p.numel() for p in model.parameters())
    assert len(stored.layers) == zoo.COMMON["num_hidden_layers"]
    assert stored.outside.total > 2 * tower


def test_falcons_own_linear_layers_are_quantized_as_any():
    model = checkpoints.skeleton_of(config_of(FAMILIES["falcon"]))
    assert len(quantized_sizes(model, SPECS["4 bits"])) == 4 * zoo.COMMON["num_hidden_layers"]
