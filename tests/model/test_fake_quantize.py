"""Weights as quantisation leaves them are those that the layers of a quantised base compute with."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig

from lora_cli.model import base_model, fake_quantize
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import zoo

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "section",
    [{"bits": 4}, {"bits": 4, "double_quant": False}, {"bits": 4, "type": "fp4"}, {"bits": 8}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_is_what_the_layers_hold(
    section: dict[str, Any], family: str, dtype: torch.dtype, tmp_path: Path
):
    zoo.make(family).save_pretrained(tmp_path)
    spec = QuantizationSpec.model_validate({**section, "compute_dtype": "float32"} if section["bits"] == 4 else section)
    source = base_model.ModelSource(str(tmp_path), {})
    quantised = base_model.load_base(source, dtype=dtype, device=CPU, quantization=spec).model
    layers = {
        f"{name}.weight": module
        for name, module in quantised.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }
    found = fake_quantize.quantized_weights(base_model.skeleton(AutoConfig.from_pretrained(tmp_path)), spec)
    assert found.keys() == layers.keys()
    assert len(found) == {"llama": 14, "llama-tied": 14, "gpt2": 8}[family]
    assert set(found.values()) == {family == "gpt2"}
    stored = zoo.make(family).state_dict()
    for name, module in layers.items():
        held: Any = module.weight
        if spec.bits == 4:
            expected = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        else:
            expected = bnb.functional.int8_vectorwise_dequant(held.data, held.SCB)
        value = fake_quantize.quantize_dequantize(spec, dtype, turned=found[name])(stored[name])
        value = value.T if found[name] else value
        assert torch.equal(value, expected.to(dtype)), name
        assert zoo.relative(value.float(), (stored[name].T if found[name] else stored[name]).float()) > 1e-3


@pytest.mark.parametrize("double", [False, True])
def test_blocks_run_on_over_the_ends_of_rows(double: bool):
    """A GPU's layers may have rows that are no whole number of blocks."""
    spec = QuantizationSpec.model_validate({"double_quant": double})
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    apply = fake_quantize.quantize_dequantize(spec, torch.float32, turned=False)
    whole = apply(weight.reshape(96, 64))
    assert torch.equal(apply(weight).reshape(96, 64), whole)
    assert float((whole - weight.reshape(96, 64)).abs().max()) < 0.6
