"""The estimate of saved activations is close to what autograd saves on the product's own training path."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.data.batches import BatchPlan
from lora_cli.model import select_attention, varlen_attention
from lora_cli.model.activation_memory import ActivationBytes, TrainingSetup, activation_bytes, score_width
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.model.packed_attention import LONG_ROW, PACKED_ATTENTION
from tests.model import zoo
from tests.support.eager_varlen import eager_varlen
from tests.support.saved_tensors import saved_bytes

TOLERANCE = 0.15
BF16, FP32 = torch.bfloat16, torch.float32
COMMON: dict[str, Any] = {"vocab_size": zoo.VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 2048}


class Shape(NamedTuple):
    """A random model, and what it is trained with."""

    family: str
    options: dict[str, Any]
    rows: tuple[int, ...] = (64,) * 6  # tokens of each
    dtype: torch.dtype = FP32
    adapter: Mapping[str, Any] = MappingProxyType({})
    packed: bool = True


def sizes(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int | None = None) -> dict[str, Any]:
    own = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return own | ({"num_key_value_heads": key_heads} if key_heads else {})


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "multi_query": True, "bias": False}
SHAPES = {
    "llama": Shape("llama", sizes(256, 688, 4, 4, 2)),
    "llama-bf16-dropout": Shape("llama", sizes(192, 512, 3, 6, 2), dtype=BF16, adapter={"dropout": 0.1}),
    "llama-long-rows": Shape("llama", sizes(128, 344, 4, 8, 8), rows=(400, 360)),
    "llama-attention-only": Shape("llama", sizes(256, 688, 4, 4, 2), adapter={"target_modules": ["q_proj", "v_proj"]}),
    "llama-padded": Shape("llama", sizes(128, 344, 4, 8, 8), packed=False),
    "qwen2": Shape("qwen2", sizes(320, 1280, 2, 5, 1)),
    "qwen3-bf16": Shape("qwen3", {**sizes(128, 256, 5, 8, 4), "head_dim": 32}, rows=(200, 190), dtype=BF16),
    "gemma3-bf16": Shape("gemma3_text", {**sizes(256, 512, 3, 4, 1), "head_dim": 64}, dtype=BF16),
    "gpt-neox": Shape("gpt_neox", sizes(192, 768, 4, 6)),
    "falcon": Shape("falcon", FALCON),
    "mixtral": Shape("mixtral", sizes(128, 256, 3, 4, 2) | EXPERTS),
    "opt": Shape("opt", {**sizes(256, 0, 3, 8), "ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0}),
    "gpt2": Shape(
        "gpt2", {"n_embd": 128, "n_layer": 3, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    ),
}


def measure(shape: Shape, *, attention: str = "auto") -> tuple[int, ActivationBytes, int]:
    """Return the bytes that a forward pass saves, the estimate of them per token, and the tokens."""
    config = AutoConfig.for_model(shape.family, **{**COMMON, **shape.options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=shape.dtype)
    model.requires_grad_(False)
    if attention == "auto":
        select_attention.choose_attention(model, "auto", packing=shape.packed)
    else:
        model.set_attn_implementation(attention)
    if shape.packed:
        assert model.config._attn_implementation in (PACKED_ATTENTION, attention)
    adapted = zoo.attached(model, **shape.adapter)
    upcast_trainable_params(adapted)
    adapted.train()
    rows = zoo.rows_of(shape.rows)
    size = sum(shape.rows) if shape.packed else len(shape.rows)
    batch = BatchPlan(rows, packing=shape.packed, size=size, batches_per_step=1, seed=0).largest_batch()
    loss = LossFunction(adapted)
    setup = TrainingSetup(shape.dtype, shape.packed, attention == "auto", score_width(shape.rows))
    return saved_bytes(adapted, lambda: loss(batch).loss), activation_bytes(adapted, setup), sum(shape.rows)


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_what_autograd_saves(name: str):
    saved, estimate, tokens = measure(SHAPES[name])
    assert estimate.saved() * tokens == pytest.approx(saved, rel=TOLERANCE)


class FlashLike(torch.autograd.Function):
    """An attention that saves what a flash kernel does: its inputs, its output and one fp32 value a head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value, output, query.new_zeros(query.shape[:2], dtype=FP32))
        return output.view_as(output)


def flash_like(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        output = eager_varlen(query, key, value, *arguments, **options)
    result: Tensor = FlashLike.apply(query, key, value, output)
    return result


@pytest.mark.parametrize("name", ["llama-bf16-dropout", "qwen3-bf16", "gemma3-bf16"])
def test_the_estimate_for_a_gpu_counts_no_probabilities(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(varlen_attention, "varlen_attn", flash_like)
    shape = SHAPES[name]._replace(adapter={"dropout": 0.0})  # whose positions are saved on the CPU only
    saved, estimate, tokens = measure(shape, attention=varlen_attention.VARLEN_ATTENTION)
    assert estimate.saved() * tokens == pytest.approx(saved, rel=TOLERANCE)


def test_each_form_of_the_memory_ladder_saves_less():
    _, estimate, _ = measure(SHAPES["llama"])
    forms = [estimate.saved(every=every) for every in (None, 4, 2, 1)]
    assert sorted(forms, reverse=True) == forms
    assert len(set(forms)) == len(forms)
    assert estimate.saved(every=1, offload=True) < estimate.saved(every=1)
    in_host_memory = estimate.offloaded(every=1)
    assert in_host_memory == len(estimate.layers) * estimate.layer_input


def test_layers_that_are_not_recomputed_save_as_before():
    shape = SHAPES["llama"]
    config = AutoConfig.for_model(shape.family, **{**COMMON, **shape.options})
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    select_attention.choose_attention(model, "auto", packing=True)
    adapted = zoo.attached(model)
    setup = TrainingSetup(FP32, True, True, score_width(shape.rows))
    estimate = activation_bytes(adapted, setup)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    model.enable_input_require_grads()
    plan = BatchPlan(zoo.rows_of(shape.rows), packing=True, size=sum(shape.rows), batches_per_step=1, seed=0)
    loss, batch = LossFunction(adapted.train()), plan.largest_batch()
    saved = saved_bytes(adapted, lambda: loss(batch).loss)
    # torch keeps the inputs of recomputed layers elsewhere.
    expected = (estimate.outside + sum(estimate.layers[1::2])) * sum(shape.rows)
    assert expected == pytest.approx(saved, rel=TOLERANCE)


def test_the_probabilities_of_long_rows_are_not_saved():
    assert score_width([LONG_ROW, LONG_ROW + 1]) == LONG_ROW
    assert score_width([LONG_ROW + 1]) == 0
