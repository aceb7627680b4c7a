"""Packing is used only with an attention that isolates rows; otherwise a LoraError lists what was measured."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.errors import LoraError
from lora_cli.model import packed_attention, select_attention
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.padded_attention import PADDED_ATTENTION
from lora_cli.model.select_attention import TOLERANCE, candidates, choose_attention
from lora_cli.model.varlen_attention import VARLEN_ATTENTION
from tests.model import zoo

CPU, CUDA, TURING = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
REST = ["flex_attention", "sdpa", "eager"]


@pytest.mark.parametrize(
    ("requested", "packing", "device", "dtype", "flash", "expected"),
    # On GPUs with packing, flex_attention, sdpa and eager follow.
    [
        ("auto", True, CPU, FP32, False, [PACKED_ATTENTION, "sdpa", "eager"]),
        ("auto", True, CPU, BF16, True, [PACKED_ATTENTION, "sdpa", "eager"]),
        ("auto", False, CPU, FP32, False, ["sdpa", "eager"]),
        ("auto", True, CUDA, BF16, True, [VARLEN_ATTENTION, "flash_attention_2", PACKED_ATTENTION, *REST]),
        ("auto", True, TURING, BF16, True, ["flash_attention_2", PACKED_ATTENTION, *REST]),
        ("auto", True, TURING, FP16, False, [PACKED_ATTENTION, *REST]),
        ("auto", False, CUDA, BF16, True, [PADDED_ATTENTION, "flash_attention_2", "sdpa", "eager"]),
        ("auto", True, CUDA, BF16, False, [VARLEN_ATTENTION, PACKED_ATTENTION, *REST]),
        ("auto", True, CUDA, FP16, False, [VARLEN_ATTENTION, PACKED_ATTENTION, *REST]),
        ("auto", True, CUDA, FP32, True, [PACKED_ATTENTION, *REST]),  # flash attention does not support fp32
        ("auto", False, CUDA, FP32, True, [PADDED_ATTENTION, "sdpa", "eager"]),
        ("eager", True, CPU, FP32, False, ["eager"]),
        ("flash_attention_2", False, CUDA, BF16, False, ["flash_attention_2"]),
    ],
)
def test_the_implementations_that_are_tried(
    monkeypatch: pytest.MonkeyPatch,
    requested: str,
    packing: bool,
    device: torch.device,
    dtype: torch.dtype,
    flash: bool,
    expected: list[str],
):
    monkeypatch.setattr(select_attention, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == TURING else (8, 9))
    assert candidates(requested, packing=packing, device=device, dtype=dtype) == expected


@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("llama", PACKED_ATTENTION),
        ("mistral", PACKED_ATTENTION),
        ("gemma3", PACKED_ATTENTION),
        ("gpt2", PACKED_ATTENTION),
        ("deepseek3", PACKED_ATTENTION),
        ("gemma2", "eager"),  # has a softcap on its scores, which neither of the faster ones supports
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_correct_implementation_is_chosen(family: str, chosen: str, dtype: torch.dtype):
    model = zoo.make(family, dtype=dtype)
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == model.config._attn_implementation == chosen
    assert check.leak == 0
    assert check.difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED_ATTENTION])
def test_a_requested_implementation_is_used_and_measured(attention: str):
    model = zoo.make("llama")
    check = choose_attention(model, attention, packing=True)
    assert check is not None
    assert check.attention == model.config._attn_implementation == attention
    assert max(check.leak, check.difference) < 1e-5


@pytest.mark.parametrize(("family", "chosen"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba", "eager")])
def test_without_packing_nothing_is_measured(family: str, chosen: str):
    model = zoo.make(family)
    assert choose_attention(model, "auto", packing=False) is None
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_mixes_rows_raises_with_what_was_measured(family: str):
    model = zoo.make(family)
    with pytest.raises(LoraError, match="does not isolate packed rows") as caught:
        choose_attention(model, "auto", packing=True)
    assert type(model).__name__ in caught.value.message
    assert "rows change each other's logits by" in caught.value.message
    assert caught.value.hint == "set data.packing: false"


def test_a_small_leak_is_detected():
    """Each token gets a thousandth of a token of the previous row: a tenth of the leak of real models."""

    class Leaking(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
            out = self.layer(hidden, **kwargs)
            return out + 1e-3 * out.roll(8, dims=1)

    model = zoo.make("llama")
    model.model.layers[0] = Leaking(model.model.layers[0])
    with pytest.raises(LoraError, match="does not isolate packed rows"):
        choose_attention(model, "auto", packing=True)


def test_choosing_the_attention_does_not_change_the_mode():
    for training in (True, False):
        model = zoo.make("llama").train(training)
        choose_attention(model, "auto", packing=True)
        assert model.training is training


def test_choosing_the_attention_does_not_change_the_random_numbers():
    model = zoo.make("llama", attention_dropout=0.1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    choose_attention(model, "auto", packing=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("family", "key"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_selects_an_attention_that_supports_it(family: str, key: str):
    model = zoo.make(family, **{key: 0.1})
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == "sdpa"
    model.train()(
        **select_attention._inputs(model, [torch.arange(9), torch.arange(5)])
    )  # as in the first training step


def test_chunked_attention_layers_are_not_run_by_the_packed_attention():
    """The packed attention would give the same logits packed and separate, but they would differ from the model's."""
    options = {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **zoo.COMMON, **options)).eval()
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == "sdpa"
    with pytest.raises(LoraError, match=r"lora_rows \(not supported: chunked_attention\)"):
        choose_attention(model, PACKED_ATTENTION, packing=True)


@pytest.mark.parametrize("broken", ["_long_attention", "_group_attention"])
def test_short_and_long_rows_are_compared_with_eager_attention(monkeypatch: pytest.MonkeyPatch, broken: str):
    """If packed and separate rows are wrong in the same way, only another attention shows it."""
    original = getattr(packed_attention, broken)
    monkeypatch.setattr(packed_attention, broken, lambda *x, scale, **kw: original(*x, scale=2 * scale, **kw))
    model = zoo.make("llama")
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == "sdpa"
    with pytest.raises(LoraError, match=r"logits by 0\.0%, packing changes logits by"):
        choose_attention(model, PACKED_ATTENTION, packing=True)


def test_a_token_that_rounding_sends_to_another_expert_is_not_reported_as_a_leak():
    """In bfloat16, packed and separate rows round differently, and some tokens of this model change their expert."""
    options = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **{**zoo.COMMON, **options})
    model = AutoModelForCausalLM.from_config(config).to(BF16).eval()
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert (check.attention, check.leak) == (PACKED_ATTENTION, 0)


def test_a_model_with_few_positions_is_measured_within_them():
    model = zoo.make("gpt2", n_positions=32)
    assert choose_attention(model, "auto", packing=True) is not None


def test_rounding_in_half_precision_is_not_reported_as_a_leak():
    """With twelve layers, because rounding errors add up over layers."""
    model = zoo.make("llama", dtype=BF16, num_hidden_layers=12)
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert (check.attention, check.leak) == (PACKED_ATTENTION, 0)
    assert check.difference > TOLERANCE[FP32]


def test_a_leak_smaller_than_rounding_is_detected_in_half_precision_too():
    model = zoo.make("llama", dtype=BF16)
    embeddings = model.get_input_embeddings()
    # Each token also gets a small part of the token seven positions before.
    embeddings.register_forward_hook(
        lambda layer, args, out: out + 0.003 * torch.nn.functional.pad(out, (0, 0, 7, 0))[:, : out.shape[1]]
    )
    check = None
    with pytest.raises(LoraError, match="does not isolate packed rows"):
        check = choose_attention(model, "auto", packing=True)
    assert check is None


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_is_not_causal_raises(packing: bool):
    """BERT has a class for causal-lm, but it attends to the token that it should predict."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = BertLMHeadModel(BertConfig(vocab_size=zoo.VOCABULARY, initializer_range=0.2, **small)).eval()
    with pytest.raises(LoraError) as caught:
        choose_attention(encoder, "auto", packing=packing)
    assert "task: BertLMHeadModel is not causal: changing a token changes the predictions" in caught.value.message
    assert "set task: seq-cls or token-cls" in str(caught.value.hint)
    choose_attention(encoder, "auto", packing=False, causal=False)
    decoder = BertLMHeadModel(BertConfig(vocab_size=zoo.VOCABULARY, is_decoder=True, **small)).eval()
    choose_attention(decoder, "auto", packing=False)


@pytest.mark.parametrize(
    "error", [TypeError("unexpected keyword"), AttributeError("no such symbol"), ImportError("ABI")]
)
def test_a_build_of_flash_attention_that_does_not_work_is_a_candidate_that_failed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    model = zoo.make("llama")
    setting = type(model).set_attn_implementation

    def fail(model: Any, name: str) -> None:
        if name == "flash_attention_2":
            raise error
        setting(model, name)

    monkeypatch.setattr(type(model), "set_attn_implementation", fail)
    monkeypatch.setattr(select_attention, "candidates", lambda *_, **__: ["flash_attention_2", "sdpa"])
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == "sdpa"
    monkeypatch.setattr(select_attention, "candidates", lambda *_, **__: ["flash_attention_2"])
    with pytest.raises(LoraError, match=rf"tried flash_attention_2 \({error}\)"):
        choose_attention(model, "auto", packing=True)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        (
            "falcon",
            {"alibi": True, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
        ),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 64}),
    ],
)
def test_a_model_that_keeps_its_attention_is_not_said_to_have_another(family: str, sizes: dict[str, int]):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    before = model.config._attn_implementation
    other = "eager" if before != "eager" else "sdpa"
    with pytest.raises(LoraError, match=f"{other} .*keeps {before}, which was set when it was built"):
        choose_attention(model, other, packing=False)
    choose_attention(model, "auto", packing=False)
    assert model.config._attn_implementation == before
