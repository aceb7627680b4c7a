"""Packing is used only where rows were seen to stay apart, and refused with what was measured elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import LoraError
from lora_cli.model import isolation
from lora_cli.model.attention import NAME
from lora_cli.model.isolation import TOLERANCE, candidates, settle
from tests.model import zoo

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "packing", "device", "dtype", "flash", "expected"),
    [
        ("auto", True, CPU, FP32, False, [NAME, "sdpa", "eager"]),
        ("auto", True, CPU, BF16, True, [NAME, "sdpa", "eager"]),
        ("auto", False, CPU, FP32, False, ["sdpa", "eager"]),
        ("auto", True, CUDA, BF16, True, ["flash_attention_2", "sdpa", "eager"]),
        ("auto", False, CUDA, BF16, True, ["flash_attention_2", "sdpa", "eager"]),
        ("auto", True, CUDA, BF16, False, ["sdpa", "eager"]),
        ("auto", True, CUDA, FP32, True, ["sdpa", "eager"]),  # flash has no fp32
        ("eager", True, CPU, FP32, False, ["eager"]),
        ("flash_attention_2", False, CUDA, BF16, False, ["flash_attention_2"]),
    ],
)
def test_what_is_tried(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    packing: bool,
    device: torch.device,
    dtype: torch.dtype,
    flash: bool,
    expected: list[str],
):
    monkeypatch.setattr(isolation, "is_flash_attn_2_available", lambda: flash)
    assert candidates(wanted, packing=packing, device=device, dtype=dtype) == expected


@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("llama", NAME),
        ("mistral", NAME),
        ("gemma3", NAME),
        ("gpt2", NAME),
        ("deepseek3", NAME),
        ("gemma2", "eager"),  # caps its scores, which neither of the faster ones does
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_that_is_right_is_chosen(family: str, chosen: str, dtype: torch.dtype):
    model = zoo.make(family, dtype=dtype)
    proof = settle(model, "auto", packing=True)
    assert proof is not None
    assert proof.attention == model.config._attn_implementation == chosen
    assert proof.leak == 0
    assert proof.difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("attention", ["sdpa", "eager", NAME])
def test_a_named_attention_is_taken_and_measured(attention: str):
    model = zoo.make("llama")
    proof = settle(model, attention, packing=True)
    assert proof is not None
    assert proof.attention == model.config._attn_implementation == attention
    assert max(proof.leak, proof.difference) < 1e-5


@pytest.mark.parametrize(("family", "chosen"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba", "eager")])
def test_without_packing_nothing_is_measured(family: str, chosen: str):
    model = zoo.make(family)
    assert settle(model, "auto", packing=False) is None
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_mixes_rows_is_refused_with_what_was_measured(family: str):
    model = zoo.make(family)
    with pytest.raises(LoraError, match="does not keep packed rows apart") as caught:
        settle(model, "auto", packing=True)
    assert type(model).__name__ in caught.value.message
    assert "rows change each other's logits by" in caught.value.message
    assert caught.value.hint == "set data.packing: false"


def test_a_small_leak_is_seen():
    """A thousandth of the row before, added to each token: a tenth of what the real ones leak."""

    class Leaking(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: torch.Tensor, **others: Any) -> Any:
            out = self.layer(hidden, **others)
            return out + 1e-3 * out.roll(8, dims=1)

    model = zoo.make("llama")
    model.model.layers[0] = Leaking(model.model.layers[0])
    with pytest.raises(LoraError, match="does not keep packed rows apart"):
        settle(model, "auto", packing=True)


def test_settling_leaves_the_mode_alone():
    for training in (True, False):
        model = zoo.make("llama").train(training)
        settle(model, "auto", packing=True)
        assert model.training is training
