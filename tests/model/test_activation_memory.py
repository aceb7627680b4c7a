"""The estimate of saved activations is close to what autograd saves on the product's own training path."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.model import select_attention, varlen_attention
from lora_cli.model.activation_memory import ActivationBytes, TrainingSetup, growth_through, row_tokens
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.base_model import BaseCheckpoint, task_heads
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.model.measure_activations import activation_bytes
from lora_cli.model.packed_attention import LONG_ROW
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import families, zoo
from tests.model.families import FAMILIES, Family
from tests.support.checkpoints import checkpoint, load
from tests.support.eager_varlen import eager_varlen
from tests.support.saved_tensors import saved_bytes

TOLERANCE = 0.15
BF16, FP32 = torch.bfloat16, torch.float32
NONE: Mapping[str, Any] = MappingProxyType({})


class Shape(NamedTuple):
    """A random model, and what it is trained with."""

    family: Family
    rows: tuple[int, ...] = (64,) * 6  # tokens of each
    dtype: torch.dtype = FP32
    adapter: Mapping[str, Any] = NONE


def decoder(kind: str, options: Mapping[str, Any], *, packs: bool = True) -> Family:
    return Family(kind, set(), {"initializer_range": 0.02, **options}, packs=packs)


def sizes(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int | None = None) -> dict[str, Any]:
    own = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return own | ({"num_key_value_heads": key_heads} if key_heads else {})


LLAMA = decoder("llama", sizes(256, 688, 4, 4, 2))
SMALL_LLAMA = decoder("llama", sizes(128, 344, 4, 8, 8))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "multi_query": True, "bias": False}
GPT2 = {"n_embd": 128, "n_layer": 3, "n_head": 4}
SHAPES = {
    "llama": Shape(LLAMA),
    "llama-bf16-dropout": Shape(decoder("llama", sizes(192, 512, 3, 6, 2)), dtype=BF16, adapter={"dropout": 0.1}),
    "llama-long-rows": Shape(SMALL_LLAMA, rows=(400, 360)),
    "llama-attention-only": Shape(LLAMA, adapter={"target_modules": ["q_proj", "v_proj"]}),
    "llama-trained-head": Shape(LLAMA, adapter={"modules_to_save": ["lm_head"]}),
    "llama-padded": Shape(SMALL_LLAMA._replace(packs=False), rows=(64, 51, 64, 60)),
    "qwen2": Shape(decoder("qwen2", sizes(320, 1280, 2, 5, 1))),
    "qwen3-bf16": Shape(decoder("qwen3", {**sizes(128, 256, 5, 8, 4), "head_dim": 32}), rows=(200, 190), dtype=BF16),
    "gemma3-bf16": Shape(decoder("gemma3_text", {**sizes(256, 512, 3, 4, 1), "head_dim": 64}), dtype=BF16),
    "gpt-neox": Shape(decoder("gpt_neox", sizes(192, 768, 4, 6))),
    "falcon": Shape(decoder("falcon", FALCON)),
    "mixtral": Shape(decoder("mixtral", sizes(128, 256, 3, 4, 2) | EXPERTS)),
    "mixtral-attention-only": Shape(
        decoder("mixtral", sizes(128, 256, 3, 4, 2) | EXPERTS), adapter={"target_modules": ["q_proj", "v_proj"]}
    ),
    "opt": Shape(decoder("opt", {**sizes(256, 0, 3, 8), "ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0})),
    "gpt2": Shape(decoder("gpt2", {**GPT2, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0})),
    "gpt2-dropout": Shape(decoder("gpt2", GPT2)),
}
# Of each kind of attention, state and task; the others of FAMILIES are slow together.
QUICK = ("gpt-neo", "gpt-oss", "gemma2", "falcon-alibi", "jetmoe", "llama4", "mamba", "mamba2", "bamba", "falcon-h1")
QUICK += ("qwen3.5", "t5", "bart", "roberta", "deberta-v2", "llama-classifier", "bart-classifier")


class Case(NamedTuple):
    """A model with weights to measure, and the same without weights."""

    model: PeftModel
    skeleton: PeftModel
    batch: Batch
    setup: TrainingSetup

    @property
    def tokens(self) -> int:
        return self.batch.input_ids.numel()

    def measured(self) -> int:
        loss = LossFunction(self.model, task=self.setup.task)
        return saved_bytes(self.model, lambda: loss(self.batch).loss)

    def estimate(self) -> ActivationBytes:
        estimate = activation_bytes(self.skeleton, self.setup)
        assert not estimate.unmeasured
        return estimate


def case_of(shape: Shape, *, attention: str = "auto", base: PreTrainedModel | None = None) -> Case:
    family, packed = shape.family, shape.family.packs
    labels = families.LABELS if TASKS[family.task].is_classification else None
    record = checkpoint(Path("nowhere"), config=families.config_of(family), task=family.task, labels=labels, pad_id=0)
    base = base or random_base(record, shape.dtype)
    if attention == "auto":
        select_attention.choose_attention(base, "auto", packing=packed, causal=family.task == "causal-lm")
    else:
        base.set_attn_implementation(attention)
    model = attached(base, shape)
    upcast_trainable_params(model)
    rows, collate = families.rows_of(family, shape.rows), families.collate_of(family, packing=packed)
    size = sum(shape.rows) if packed else len(shape.rows)
    plan = BatchPlan(rows, packing=packed, size=size, batches_per_step=1, seed=0, collate=collate)
    setup = TrainingSetup(
        shape.dtype,
        packed,
        on_cpu=attention == "auto",
        row=row_tokens(shape.rows, packed=packed),
        task=family.task,
        target=families.TARGET_TOKENS,
    )
    return Case(model.train(), attached(record.skeleton(), shape), plan.largest_batch(), setup)


def random_base(record: BaseCheckpoint, dtype: torch.dtype) -> PreTrainedModel:
    config = deepcopy(record.config)
    if record.labels:
        config.id2label, config.problem_type = dict(enumerate(record.labels.names)), "single_label_classification"
    torch.manual_seed(0)
    model: PreTrainedModel = record.auto_class.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def attached(base: PreTrainedModel, shape: Shape) -> PeftModel:
    family = shape.family
    heads = task_heads(base, family.task)
    context = AdapterContext(task=family.task, heads=heads, total_steps=10, encode=lambda text: [3] * len(text.split()))
    return zoo.attached(base, context=context, **{**family.adapter, **shape.adapter})


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_what_autograd_saves(name: str):
    case = case_of(SHAPES[name])
    assert case.estimate().saved(case.tokens) == pytest.approx(case.measured(), rel=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK)],
)
def test_the_estimate_is_what_autograd_saves_in_every_family(name: str):
    family = FAMILIES[name]
    case = case_of(Shape(family, rows=(64,) * 6 if family.packs else (64, 60, 64, 51)))
    assert case.estimate().saved(case.tokens) == pytest.approx(case.measured(), rel=TOLERANCE)


VIRTUAL = [name for name in zoo.METHODS if name not in zoo.LAYERED]


@pytest.mark.parametrize("method", zoo.METHODS)
def test_the_estimate_is_what_autograd_saves_with_every_method(method: str):
    packs = method not in VIRTUAL
    shape = Shape(LLAMA._replace(packs=packs), rows=(64, 64, 50, 64), adapter={"method": method})
    case = case_of(shape)
    assert case.estimate().saved(case.tokens) == pytest.approx(case.measured(), rel=TOLERANCE)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_the_update_of_every_layer_is_counted_as_fixed_bytes(method: str):
    """They keep the update, which is as large as the weight: with few tokens, little else is saved."""
    case = case_of(Shape(LLAMA, rows=(8,), adapter={"method": method}))
    estimate = case.estimate()
    weights = 4 * sum(
        module.weight.numel() for module in case.model.get_base_model().modules() if type(module) is torch.nn.Linear
    )
    head = 4 * case.model.get_base_model().get_output_embeddings().weight.numel()
    assert estimate.saved(8) == pytest.approx(case.measured(), rel=TOLERANCE)
    assert sum(layer.fixed for layer in estimate.layers) > 0.9 * (weights - head)
    assert estimate.saved(8, every=1) < 0.5 * estimate.saved(8)  # recomputed layers keep none


@pytest.mark.parametrize(
    ("bits", "dtype", "compute", "unfused"),
    [
        (4, BF16, BF16, None),
        (4, FP32, BF16, BF16),  # PEFT's own layers run, which cast
        (8, BF16, FP32, FP32),
    ],
)
def test_the_estimate_over_quantized_weights(
    bits: int, dtype: torch.dtype, compute: torch.dtype, unfused: torch.dtype | None, tmp_path: Path
):
    name = str(compute).removeprefix("torch.")
    spec = {"bits": bits, **({"compute_dtype": name} if bits == 4 else {})}
    family = decoder("llama", sizes(256, 512, 3, 4, 2), packs=bits == 4)  # 4 bits: in blocks of 64 weights
    shape = Shape(family, dtype=dtype)
    folder = families.write(family, tmp_path / "base")
    base = load(folder, dtype=dtype, quantization=QuantizationSpec.model_validate(spec))
    case = case_of(shape, base=base)
    case = case._replace(setup=case.setup._replace(unfused=unfused))
    assert case.estimate().saved(case.tokens) == pytest.approx(case.measured(), rel=TOLERANCE)


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
    shape = SHAPES[name]._replace(adapter={"dropout": 0.0})  # whose positions are saved on the CPU only
    case = case_of(shape, attention=varlen_attention.VARLEN_ATTENTION)
    estimate = case.estimate().saved(case.tokens)
    with_dropout = case_of(SHAPES[name]._replace(adapter={"dropout": 0.1}), attention=varlen_attention.VARLEN_ATTENTION)
    assert with_dropout.estimate().saved(case.tokens) == estimate
    monkeypatch.setattr(varlen_attention, "varlen_attn", flash_like)
    assert estimate == pytest.approx(case.measured(), rel=TOLERANCE)


def test_each_form_of_the_memory_ladder_saves_less():
    case = case_of(SHAPES["llama"])
    estimate, tokens = case.estimate(), case.tokens
    forms = [estimate.saved(tokens, every=every) for every in (None, 4, 2, 1)]
    assert sorted(forms, reverse=True) == forms
    assert len(set(forms)) == len(forms)
    assert estimate.saved(tokens, every=1, offload=True) < estimate.saved(tokens, every=1)
    in_host_memory = estimate.offloaded(every=1)
    assert in_host_memory == len(estimate.layers) * estimate.layer_input


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_layers_that_are_not_recomputed_save_as_before(method: str):
    case = case_of(Shape(LLAMA, adapter={"method": method}))
    estimate = case.estimate()
    base = case.model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    base.enable_input_require_grads()
    # torch keeps the inputs of recomputed layers elsewhere.
    expected = estimate.outside.at(case.tokens) + sum(layer.at(case.tokens) for layer in estimate.layers[1::2])
    assert expected == pytest.approx(case.measured(), rel=TOLERANCE)


def test_attention_over_a_whole_pack_grows_with_the_square_of_its_tokens():
    """GPT-2's dropout rules our attention for packed rows out: torch computes the scores of all pairs of tokens."""
    shape = SHAPES["gpt2-dropout"]
    estimate = case_of(shape).estimate()
    assert all(layer.square > 0 for layer in estimate.layers)
    twice = case_of(shape._replace(rows=shape.rows * 2))
    assert estimate.saved(twice.tokens) == pytest.approx(twice.measured(), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_long_rows_of_models_that_go_through_them_token_by_token_are_estimated_from_shorter_ones(name: str):
    case = case_of(Shape(FAMILIES[name], rows=(800, 790)))
    assert case.estimate().saved(case.tokens) == pytest.approx(case.measured(), rel=TOLERANCE)


def test_a_model_that_does_not_run_without_weights_is_counted_roughly(monkeypatch: pytest.MonkeyPatch):
    case = case_of(SHAPES["llama"])
    measured = case.measured()

    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("the first token is not a number")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    estimate = activation_bytes(case.skeleton, case.setup)
    assert estimate.unmeasured == "ValueError: the first token is not a number"
    assert measured < estimate.saved(case.tokens) < 4 * measured


def test_measuring_draws_no_random_numbers_and_leaves_the_model_alone():
    case = case_of(SHAPES["llama-bf16-dropout"])
    before = torch.random.get_rng_state()
    dtypes = {name: parameter.dtype for name, parameter in case.skeleton.named_parameters()}
    case.estimate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: parameter.dtype for name, parameter in case.skeleton.named_parameters()} == dtypes
    assert not any("forward" in vars(layer) for layer in case.skeleton.get_base_model().model.layers)


def test_the_row_that_takes_the_most_for_each_token():
    assert row_tokens([12, LONG_ROW, LONG_ROW + 1], packed=True) == LONG_ROW  # longer rows have no probabilities
    assert row_tokens([LONG_ROW + 1], packed=True) == LONG_ROW + 1
    assert row_tokens([12, 900], packed=False) == 900


def test_a_growth_goes_through_its_points():
    growth = growth_through([(tokens, 5 + 3 * tokens + 2 * tokens**2) for tokens in (4, 6, 8)])
    assert growth == pytest.approx((5, 3, 2))
    assert growth.at(100) == 5 + 300 + 20_000
