"""Fake-quantized weights are equal to the weights that the layers of a quantized base compute with."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from lora_cli.model import fake_quantize
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import zoo
from tests.support import checkpoints

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "section",
    [{"bits": 4}, {"bits": 4, "double_quant": False}, {"bits": 4, "type": "fp4"}, {"bits": 8}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantized_weights_equal_the_dequantized_weights_of_the_layers(
    section: dict[str, Any], family: str, dtype: torch.dtype, tmp_path: Path
):
    zoo.make(family).save_pretrained(tmp_path)
    spec = QuantizationSpec.model_validate({**section, "compute_dtype": "float32"} if section["bits"] == 4 else section)
    quantized = checkpoints.load(tmp_path, dtype=dtype, quantization=spec)
    layers = {
        f"{name}.weight": module
        for name, module in quantized.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }
    transposed = fake_quantize.quantized_weights(checkpoints.checkpoint(tmp_path).skeleton(), spec)
    assert transposed.keys() == layers.keys()
    assert len(transposed) == {"llama": 14, "llama-tied": 14, "gpt2": 8}[family]
    assert set(transposed.values()) == {family == "gpt2"}
    originals = zoo.make(family).state_dict()
    for name, module in layers.items():
        weight: Any = module.weight
        if spec.bits == 4:
            expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        original = originals[name]
        value = fake_quantize.quantize_dequantize(spec, dtype, transposed=transposed[name])(original)
        if transposed[name]:
            value, original = value.T, original.T
        assert torch.equal(value, expected.to(dtype)), name
        assert zoo.relative(value.float(), original.float()) > 1e-3


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_that_is_quantized_in_parts_has_the_values_of_one_part(
    kind: str, double: bool, monkeypatch: pytest.MonkeyPatch
):
    spec = QuantizationSpec.model_validate({"type": kind, "double_quant": double})
    weight = torch.randn(71, 192, generator=torch.Generator().manual_seed(0))
    apply = fake_quantize.quantize_dequantize(spec, torch.bfloat16, transposed=False)
    codes, state = bnb.functional.quantize_4bit(weight.bfloat16().view(-1), quant_type=kind, compress_statistics=double)
    expected = bnb.functional.dequantize_4bit(codes, state).view(weight.shape)
    for size in (fake_quantize.PART_WEIGHTS, 64 * 5, 64):
        monkeypatch.setattr(fake_quantize, "PART_WEIGHTS", size)
        assert torch.equal(apply(weight), expected)


@pytest.mark.parametrize("double", [False, True])
def test_blocks_continue_across_row_ends(double: bool):
    """On a GPU, in_features of a layer may be other than a multiple of the block size."""
    spec = QuantizationSpec.model_validate({"double_quant": double})
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    apply = fake_quantize.quantize_dequantize(spec, torch.float32, transposed=False)
    aligned = apply(weight.reshape(96, 64))
    assert torch.equal(apply(weight).reshape(96, 64), aligned)
    assert float((aligned - weight.reshape(96, 64)).abs().max()) < 0.6
