"""Tiny random models of known families, random dataset rows, and adapters with fresh or changed weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.model import attach_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.fused_lora import is_fusable
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec

VOCABULARY = 97
# Weights ten times as large as usual, so that attention is not uniform and logits are large relative to rounding.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # 2 query heads share a key head
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),  # biases in q, k, v
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "phi3": ("phi3", {}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "attn_pdrop": 0.0},
    ),  # Conv1D layers
    "deepseek3": (  # values are narrower than keys
        "deepseek_v3",
        {
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt-oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "bloom": ("bloom", {}),
    "mamba": ("mamba", {"state_size": 8}),
}


def make(family: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", **options: Any) -> Any:
    """Return a frozen random model in eval mode, with the same weights at every call."""
    kind, own = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**COMMON, **own, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).requires_grad_(False).eval()


# Options that make the adapters small. loftq needs a quantized base and is tested in test_quantize.py.
SMALL: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.0,
    "final_rank": 2,
    "rotation_size": 8,
    "hidden_size": 32,
}
METHODS = [name for name, facts in METHOD_FACTS.items() if not facts.needs_bits]
LAYERED = [
    name for name in METHODS if "target_modules" in METHOD_FACTS[name].options
]  # without the methods of virtual tokens


def spec_of(**options: Any) -> AdapterSpec:
    """Return the section of a small adapter; the default method is lora."""
    supported = METHOD_FACTS[options.get("method", "lora")].options
    return AdapterSpec.model_validate({**{k: v for k, v in SMALL.items() if k in supported}, **options})


def attached(
    model: PreTrainedModel, *, seed: int = 0, context: AdapterContext | None = None, **options: Any
) -> PeftModel:
    """Attach a fresh adapter to `model`; methods that are initialized from data get random rows."""
    plan = BatchPlan(rows_of([30, 41, 12, 25, 60, 7]), packing=True, size=60, batches_per_step=1, seed=0)
    context = context or AdapterContext(
        total_steps=10, plan=plan, encode=lambda text: [3 + len(w) for w in text.split()]
    )
    return attach_adapter.attach(model, spec_of(**options), seed=seed, context=context)


def adapted(model: PreTrainedModel, *, seed: int = 0, **options: Any) -> PeftModel:
    """Attach an adapter to `model` and change its weights, as training would."""
    peft_model = attached(model, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name and "scale" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
        elif parameter.requires_grad and ".lora_A." not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
    return peft_model


def gradients(model: PeftModel, *, recomputed: bool = False) -> list[Tensor]:
    """Return the loss, and the gradients of all trained parameters, on the same tokens and random numbers each time."""
    if recomputed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1)
        model.get_base_model().enable_input_require_grads()
    ids = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def fused_layers(model: PeftModel) -> list[torch.nn.Module]:
    """Return the LoRA layers whose training forward is fused."""
    return [module for module in model.modules() if is_fusable(module)]


class MemoryRows:
    """Rows in memory, with the interface that BatchPlan needs."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return self._rows[i]


def rows_of(lengths: Sequence[int], *, vocabulary: int = VOCABULARY, seed: int = 0) -> MemoryRows:
    """Return random rows with `lengths` tokens; in each, random spans are labeled."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, vocabulary, length).astype(np.int32)
        starts = np.sort(rng.integers(0, length + 1, 4))
        labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
        for start, stop in (starts[:2], starts[2:]):
            labels[start:stop] = ids[start:stop]
        labels[-1] = ids[-1]
        rows.append(Row(ids, labels, f"rows.jsonl:{number + 1}"))
    return MemoryRows(rows)


def loss_row_by_row(model: torch.nn.Module, rows: MemoryRows) -> tuple[Tensor, int]:
    """Run transformers' own forward on each row alone; return summed loss ([] fp64, nats) and number of labels."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(len(rows)):
        ids = torch.tensor(rows[i].input_ids[None].astype(np.int64))
        labels = torch.tensor(rows[i].labels.astype(np.int64))[1:]
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").double()
        count += int((labels != IGNORE_INDEX).sum())
    return total, count


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of `a` and `b`, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
