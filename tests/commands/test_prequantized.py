"""Bases that are already quantized (bitsandbytes, GPTQ, AWQ, ...): trained if PEFT supports it, else refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.model import prequantized
from lora_cli.model.prequantized import Prequantized
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec
from tests.commands.conftest import Lora, WriteRecipe
from tests.support import checkpoints

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, ("bitsandbytes", 4)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, ("bitsandbytes", 8)),
        ({"load_in_8bit": True}, ("bitsandbytes", 8)),  # as in old checkpoints
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", 4)),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, ("awq", 4)),
        ({"quant_method": "mxfp4"}, ("mxfp4", None)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", None)),
        (None, None),
    ],
)
def test_the_format_is_detected_from_the_config(
    tmp_path: Path, section: dict[str, Any] | None, expected: tuple[str, int] | None
):
    config = {"model_type": "llama", "quantization_config": section} if section else {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    detected = prequantized.detect_prequantized(AutoConfig.from_pretrained(tmp_path))
    assert detected == (expected and Prequantized(*expected))


def error_of(base: Prequantized, *, method: str = "lora", bits: int | None = None) -> LoraError:
    """Return the error of training `method` on `base`, with a `quantization` section if `bits` is set."""
    section = QuantizationSpec.model_validate({"bits": bits}) if bits else None
    with pytest.raises(LoraError) as caught:
        prequantized.check_prequantized(base, AdapterSpec.model_validate({"method": method}), section, path="org/model")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value


def test_a_quantized_base_is_not_quantized_again():
    error = error_of(Prequantized("gptq", 4), bits=4)
    assert error.message == "quantization: org/model is already quantized (gptq, 4 bits) and cannot be quantized again"
    assert error.hint == "remove the quantization section, or set model.path to the 16-bit model"


@pytest.mark.parametrize(
    ("method", "install"), [("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("torchao", "torchao")]
)
def test_the_packages_of_the_format_are_listed(monkeypatch: pytest.MonkeyPatch, method: str, install: str):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: None)
    error = error_of(Prequantized(method, 4))
    assert f"which needs {install.replace(' ', ' and ')}" in error.message
    assert f"pip install {install}" in str(error.hint)


@pytest.mark.parametrize(
    "method", [name for name, known in prequantized.QUANTIZATION_METHODS.items() if known.untrainable]
)
def test_untrainable_formats_are_refused_with_the_reason(method: str):
    error = error_of(Prequantized(method, None))
    assert prequantized.QUANTIZATION_METHODS[method].untrainable in error.message
    assert "quantization: {bits: 4}" in str(error.hint)


def test_an_unknown_format_is_refused():
    assert "a format that PEFT does not support" in error_of(Prequantized("newest", None)).message


@pytest.mark.parametrize(
    ("base", "method", "message"),
    [
        (("gptq", 4), "dora", "dora does not support gptq weights"),
        (("gptq", 4), "pissa", "pissa does not support gptq weights: it is initialized from unquantized weights"),
        (("bitsandbytes", 8), "dora", "dora does not support bitsandbytes weights"),
        (
            ("bitsandbytes", 4),
            "loha",
            "loha does not support bitsandbytes weights: PEFT supports it on unquantized weights only",
        ),
        (("bitsandbytes", 4), "loftq", "loftq needs the unquantized weights"),
    ],
)
def test_methods_that_the_format_does_not_support_are_refused(
    monkeypatch: pytest.MonkeyPatch, base: tuple[str, int], method: str, message: str
):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: object())
    assert message in error_of(Prequantized(*base), method=method).message


@pytest.mark.parametrize("method", prequantized.METHODS_FOR_OTHER_FORMATS)
def test_supported_methods_are_accepted_on_every_format(monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: object())
    spec = AdapterSpec.model_validate({"method": method})
    for base in (("gptq", 4), ("awq", 4), ("torchao", None), ("bitsandbytes", 8), ("bitsandbytes", 4)):
        prequantized.check_prequantized(Prequantized(*base), spec, None, path="org/model")


@pytest.fixture(params=[4, 8])
def saved_bits(request: pytest.FixtureRequest, workdir: Path) -> int:
    """Save the tiny base, quantized by bitsandbytes, as the folder `small`; return its number of bits."""
    spec = QuantizationSpec.model_validate({"bits": request.param})
    checkpoints.load(Path("base"), dtype=torch.bfloat16, quantization=spec).save_pretrained("small")
    AutoTokenizer.from_pretrained("base").save_pretrained("small")
    return int(request.param)


def test_a_quantized_checkpoint_trains_the_same_adapter_as_quantizing_at_load(
    saved_bits: int, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    common = {"data.packing": False, "model.dtype": "bfloat16", "training.batch_size": 4}
    recipe({**common, "quantization": {"bits": saved_bits}})
    quantized_at_load = lora("train", "recipe.yaml")
    assert quantized_at_load.code == 0, quantized_at_load.err
    shutil.copytree("runs/a/adapter", "expected")
    recipe({**common, "model.path": "small"})
    checked = lora("check", "recipe.yaml")
    assert checked.code == 0, checked.err
    result = lora("train", "recipe.yaml", "--fresh")
    assert result.code == 0, result.err
    for text in (checked.out, result.err):
        assert "its weights were quantized before: bitsandbytes" in text
    pattern = re.compile(r"eval at step \d+: .*")
    assert pattern.findall(result.err) == pattern.findall(quantized_at_load.err)
    weights = "adapter_model.safetensors"
    assert Path("runs/a/adapter", weights).read_bytes() == Path("expected", weights).read_bytes()
    assert lora("eval", "runs/a").code == 0

    refused = lora("train", "recipe.yaml", "--fresh", "--set", "quantization={bits: 4}", "--set", "data.packing=false")
    assert refused.code == 2
    assert f"small is already quantized (bitsandbytes, {saved_bits} bits) and cannot be quantized again" in refused.err
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert merged.last_two == [
        "error: small is quantized (bitsandbytes): an adapter is merged into unquantized weights",
        "hint: name the 16-bit model that it was made from: --base PATH --other-base",
    ]
    assert lora("merge", "runs/a/adapter", "--out", "merged", "--base", "base", "--other-base").code == 0


def test_a_config_without_quantization_is_not_detected_as_quantized():
    assert prequantized.detect_prequantized(PretrainedConfig()) is None
