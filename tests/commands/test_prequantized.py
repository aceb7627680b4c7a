"""Bases that are quantised already: recognised, trained on where PEFT can, refused in one line where not."""

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

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, ("bitsandbytes", 4)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, ("bitsandbytes", 8)),
        ({"load_in_8bit": True}, ("bitsandbytes", 8)),  # as old checkpoints have it
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", 4)),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, ("awq", 4)),
        ({"quant_method": "mxfp4"}, ("mxfp4", None)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", None)),
        (None, None),
    ],
)
def test_it_is_recognised_by_its_config(tmp_path: Path, section: dict[str, Any] | None, found: tuple[str, int] | None):
    config = {"model_type": "llama", "quantization_config": section} if section else {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert prequantized.detect_prequantized(AutoConfig.from_pretrained(tmp_path)) == (found and Prequantized(*found))


def refusal(found: Prequantized, *, method: str = "lora", bits: int | None = None) -> LoraError:
    section = QuantizationSpec.model_validate({"bits": bits}) if bits else None
    with pytest.raises(LoraError) as caught:
        prequantized.check_prequantized(
            found, AdapterSpec.model_validate({"method": method}), section, path="org/model"
        )
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value


def test_it_is_not_quantised_twice():
    error = refusal(Prequantized("gptq", 4), bits=4)
    assert error.message == "quantization: org/model is already quantized (gptq, 4 bits) and cannot be quantized again"
    assert error.hint == "remove the quantization section, or set model.path to the 16-bit model"


@pytest.mark.parametrize(
    ("method", "install"), [("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("torchao", "torchao")]
)
def test_what_its_format_needs_is_named(monkeypatch: pytest.MonkeyPatch, method: str, install: str):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: None)
    error = refusal(Prequantized(method, 4))
    assert f"which needs {install.replace(' ', ' and ')}" in error.message
    assert f"pip install {install}" in str(error.hint)


@pytest.mark.parametrize(
    "method", [name for name, known in prequantized.QUANTIZATION_METHODS.items() if known.untrainable]
)
def test_formats_without_a_way_back_are_refused_with_the_reason(method: str):
    error = refusal(Prequantized(method, None))
    assert prequantized.QUANTIZATION_METHODS[method].untrainable in error.message
    assert "quantization: {bits: 4}" in str(error.hint)


def test_an_unknown_format_is_refused():
    assert "a format that PEFT does not support" in refusal(Prequantized("newest", None)).message


@pytest.mark.parametrize(
    ("found", "method", "said"),
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
def test_methods_that_cannot_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, int], method: str, said: str
):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: object())
    assert said in refusal(Prequantized(*found), method=method).message


@pytest.mark.parametrize("method", prequantized.METHODS_FOR_OTHER_FORMATS)
def test_methods_that_can_pass(monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.setattr(prequantized, "find_spec", lambda package: object())
    spec = AdapterSpec.model_validate({"method": method})
    for found in (("gptq", 4), ("awq", 4), ("torchao", None), ("bitsandbytes", 8), ("bitsandbytes", 4)):
        prequantized.check_prequantized(Prequantized(*found), spec, None, path="org/model")


@pytest.fixture(params=[4, 8])
def saved(request: pytest.FixtureRequest, place: Path) -> int:
    """The tiny base, quantised by bitsandbytes and saved so, as the folder `small`."""
    spec = QuantizationSpec.model_validate({"bits": request.param})
    checkpoints.load(Path("base"), dtype=torch.bfloat16, quantization=spec).save_pretrained("small")
    AutoTokenizer.from_pretrained("base").save_pretrained("small")
    return int(request.param)


def test_a_checkpoint_of_bitsandbytes_is_trained_on_as_if_quantised_here(
    saved: int, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    common = {"data.packing": False, "model.dtype": "bfloat16", "training.batch_size": 4}
    recipe({**common, "quantization": {"bits": saved}})
    here = lora("train", "recipe.yaml")
    assert here.code == 0, here.err
    shutil.copytree("runs/a/adapter", "expected")
    recipe({**common, "model.path": "small"})
    checked = lora("check", "recipe.yaml")
    assert checked.code == 0, checked.err
    done = lora("train", "recipe.yaml", "--fresh")
    assert done.code == 0, done.err
    for text in (checked.out, done.err):
        assert "its weights were quantized before: bitsandbytes" in text
    pattern = re.compile(r"eval at step \d+: .*")
    assert pattern.findall(done.err) == pattern.findall(here.err)
    weights = "adapter_model.safetensors"
    assert Path("runs/a/adapter", weights).read_bytes() == Path("expected", weights).read_bytes()
    assert lora("eval", "runs/a").code == 0

    refused = lora("train", "recipe.yaml", "--fresh", "--set", "quantization={bits: 4}", "--set", "data.packing=false")
    assert refused.code == 2
    assert f"small is already quantized (bitsandbytes, {saved} bits) and cannot be quantized again" in refused.err
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert merged.last_two == [
        "error: small is quantized (bitsandbytes): an adapter is merged into unquantized weights",
        "hint: name the 16-bit model that it was made from: --base PATH --other-base",
    ]
    assert lora("merge", "runs/a/adapter", "--out", "merged", "--base", "base", "--other-base").code == 0


def test_a_plain_config_is_no_quantised_one():
    assert prequantized.detect_prequantized(PretrainedConfig()) is None
