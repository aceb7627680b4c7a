"""Packing is used only where rows were seen to stay apart, and refused with what was measured elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.errors import LoraError
from lora_cli.model import packed_attention, select_attention
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.select_attention import TOLERANCE, candidates, choose_attention
from tests.model import zoo

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "packing", "device", "dtype", "flash", "expected"),
    [
        ("auto", True, CPU, FP32, False, [PACKED_ATTENTION, "sdpa", "eager"]),
        ("auto", True, CPU, BF16, True, [PACKED_ATTENTION, "sdpa", "eager"]),
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
    monkeypatch.setattr(select_attention, "is_flash_attn_2_available", lambda: flash)
    assert candidates(wanted, packing=packing, device=device, dtype=dtype) == expected


@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("llama", PACKED_ATTENTION),
        ("mistral", PACKED_ATTENTION),
        ("gemma3", PACKED_ATTENTION),
        ("gpt2", PACKED_ATTENTION),
        ("deepseek3", PACKED_ATTENTION),
        ("gemma2", "eager"),  # caps its scores, which neither of the faster ones does
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_that_is_right_is_chosen(family: str, chosen: str, dtype: torch.dtype):
    model = zoo.make(family, dtype=dtype)
    proof = choose_attention(model, "auto", packing=True)
    assert proof is not None
    assert proof.attention == model.config._attn_implementation == chosen
    assert proof.leak == 0
    assert proof.difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED_ATTENTION])
def test_a_named_attention_is_taken_and_measured(attention: str):
    model = zoo.make("llama")
    proof = choose_attention(model, attention, packing=True)
    assert proof is not None
    assert proof.attention == model.config._attn_implementation == attention
    assert max(proof.leak, proof.difference) < 1e-5


@pytest.mark.parametrize(("family", "chosen"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba", "eager")])
def test_without_packing_nothing_is_measured(family: str, chosen: str):
    model = zoo.make(family)
    assert choose_attention(model, "auto", packing=False) is None
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_mixes_rows_is_refused_with_what_was_measured(family: str):
    model = zoo.make(family)
    with pytest.raises(LoraError, match="does not keep packed rows apart") as caught:
        choose_attention(model, "auto", packing=True)
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
        choose_attention(model, "auto", packing=True)


def test_settling_leaves_the_mode_alone():
    for training in (True, False):
        model = zoo.make("llama").train(training)
        choose_attention(model, "auto", packing=True)
        assert model.training is training


@pytest.mark.parametrize(("family", "key"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_takes_an_attention_that_has_it(family: str, key: str):
    model = zoo.make(family, **{key: 0.1})
    proof = choose_attention(model, "auto", packing=True)
    assert proof is not None
    assert proof.attention == "sdpa"
    model.train()(**select_attention._inputs(model, [torch.arange(9), torch.arange(5)]))  # as the first step does


def test_layers_that_attend_in_chunks_are_not_left_to_row_attention():
    """Its own rows agree with each other, packed or not, and none of them with the model."""
    options = {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **zoo.COMMON, **options)).eval()
    proof = choose_attention(model, "auto", packing=True)
    assert proof is not None
    assert proof.attention == "sdpa"
    with pytest.raises(LoraError, match=r"lora_rows \(layers of chunked_attention\)"):
        choose_attention(model, PACKED_ATTENTION, packing=True)


@pytest.mark.parametrize("broken", ["_long_attention", "_group_attention"])
def test_rows_are_held_against_eager_attention_long_ones_too(monkeypatch: pytest.MonkeyPatch, broken: str):
    """Wrong in the same way packed and apart: only another attention can tell."""
    right = getattr(packed_attention, broken)
    monkeypatch.setattr(packed_attention, broken, lambda *x, scale, **kw: right(*x, scale=2 * scale, **kw))
    model = zoo.make("llama")
    proof = choose_attention(model, "auto", packing=True)
    assert proof is not None
    assert proof.attention == "sdpa"
    with pytest.raises(LoraError, match=r"logits by 0\.0%, packed is off by"):
        choose_attention(model, PACKED_ATTENTION, packing=True)


def test_a_model_of_few_positions_is_measured_within_them():
    model = zoo.make("gpt2", n_positions=32)
    assert choose_attention(model, "auto", packing=True) is not None


def test_rounding_in_half_precision_is_no_leak():
    """As many layers as would add up to more than two layers show."""
    model = zoo.make("llama", dtype=BF16, num_hidden_layers=12)
    proof = choose_attention(model, "auto", packing=True)
    assert proof is not None
    assert (proof.attention, proof.leak) == (PACKED_ATTENTION, 0)
    assert proof.difference > TOLERANCE[FP32]


def test_a_leak_below_rounding_is_seen_in_half_precision_too():
    model = zoo.make("llama", dtype=BF16)
    embeddings = model.get_input_embeddings()
    # Each token also carries a little of the token seven before.
    embeddings.register_forward_hook(lambda layer, args, out: out + 0.003 * out.roll(7, dims=1))
    proof = None
    with pytest.raises(LoraError, match="does not keep packed rows apart"):
        proof = choose_attention(model, "auto", packing=True)
    assert proof is None


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_looks_ahead_is_no_language_model(packing: bool):
    """BERT has a class for causal-lm, which sees the token that it is to predict."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = BertLMHeadModel(BertConfig(vocab_size=zoo.VOCABULARY, initializer_range=0.2, **small)).eval()
    with pytest.raises(LoraError) as caught:
        choose_attention(encoder, "auto", packing=packing)
    if not packing:
        assert "task: BertLMHeadModel looks ahead: a token changes what is predicted before it" in caught.value.message
        assert "write task: seq-cls or token-cls" in str(caught.value.hint)
    choose_attention(encoder, "auto", packing=False, causal=False)
    decoder = BertLMHeadModel(BertConfig(vocab_size=zoo.VOCABULARY, is_decoder=True, **small)).eval()
    choose_attention(decoder, "auto", packing=False)
