"""Tiny random checkpoints of many model families, with the linear layers of each and whether it supports packing."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

from lora_cli.data.class_labels import ClassLabels
from lora_cli.data.collate import (
    Collate,
    collate_packed,
    collate_padded,
    collate_seq2seq,
    collate_sequence_classification,
    collate_token_classification,
)
from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.model.base_model import LoadedBase
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.tasks import TaskName
from tests.model import zoo
from tests.model.zoo import COMMON
from tests.support.checkpoints import CPU, checkpoint

TARGET_TOKENS = 9  # of rows of seq2seq-lm
LABELS = ClassLabels("single", ("yes", "no", "maybe"))
NONE: Mapping[str, Any] = MappingProxyType({})
GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
BERT = {"query", "key", "value", "dense"}
BART = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


class Family(NamedTuple):
    """One architecture, with options that make it small or enable its special features."""

    kind: str  # transformers' model_type
    layers: set[str]  # kinds of linear layers that all-linear adapts, by the last part of their names
    options: Mapping[str, Any] = NONE
    task: TaskName = "causal-lm"
    packs: bool = False  # whether some attention implementation isolates its packed rows
    adapter: Mapping[str, Any] = NONE  # options that its adapter needs


MOE = {"num_experts_per_tok": 2}
# Multi-head latent attention, as in DeepSeek V2.
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", GATED, packs=True),
    "mistral": Family("mistral", GATED, {"sliding_window": 8}, packs=True),
    "mixtral": Family("mixtral", EXPERTS, {"num_local_experts": 4, **MOE}, packs=True),
    "qwen2": Family("qwen2", GATED, packs=True),
    "qwen3": Family("qwen3", GATED, {"head_dim": 24}, packs=True),
    "qwen3-moe": Family(
        "qwen3_moe", EXPERTS, {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, **MOE}, packs=True
    ),
    # PEFT adapts the layers of its shared experts, unlike those of deepseek-v3.
    "qwen2-moe": Family(
        "qwen2_moe",
        {*EXPERTS, "gate_proj", "up_proj", "shared_expert_gate"},
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, **MOE},
        packs=True,
    ),
    "olmoe": Family("olmoe", EXPERTS, {"num_experts": 4, **MOE}, packs=True),
    "granite-moe": Family("granitemoe", EXPERTS, {"num_local_experts": 4, **MOE}, packs=True),
    # Its experts have biases, an interleaved gate_up_proj, and weights stored as [experts, in, out].
    "gpt-oss": Family(
        "gpt_oss",
        EXPERTS,
        {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8, "rope_parameters": ROPE, **MOE},
    ),
    # Its experts run on all tokens, in a forward function that transformers does not exchange.
    "llama4": Family(
        "llama4_text",
        {*EXPERTS, "gate_proj", "up_proj"},
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
        packs=True,
    ),
    "jetmoe": Family("jetmoe", {"kv_proj", "weight"}, {"num_local_experts": 4, "kv_channels": 16, **MOE}, packs=True),
    # Its first layer is dense, and its other layers have shared experts, whose names PEFT reads as those of experts.
    "deepseek-v3": Family(
        "deepseek_v3",
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_up_proj", "down_proj"},
        {
            "first_k_dense_replace": 1,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            **MOE,
        },
        packs=True,
    ),
    "gemma2": Family("gemma2", GATED, {"head_dim": 16, "sliding_window": 8}, packs=True),
    "gemma3": Family(
        "gemma3_text", GATED, {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}, packs=True
    ),
    "phi3": Family("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, packs=True),
    "falcon": Family("falcon", FUSED, {"multi_query": True, "ffn_hidden_size": 128}, packs=True),
    "falcon-40b": Family(
        "falcon",
        FUSED,
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
        packs=True,
    ),
    "falcon-alibi": Family("falcon", FUSED, {"alibi": True, "ffn_hidden_size": 128}),
    "gpt2": Family(
        "gpt2", {"c_attn", "c_proj", "c_fc"}, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}, packs=True
    ),
    "gpt-neox": Family("gpt_neox", FUSED, packs=True),
    "gpt-j": Family(
        "gptj",
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 2048},
        packs=True,
    ),
    "opt": Family("opt", BART, {"ffn_dim": 128, "word_embed_proj_dim": 64}, packs=True),
    "bloom": Family("bloom", FUSED, {"n_head": 4, "n_layer": 2}),
    "olmo2": Family("olmo2", GATED, packs=True),
    "granite": Family("granite", GATED, {"logits_scaling": 4.0}, packs=True),
    "smollm3": Family("smollm3", GATED, packs=True),
    "stablelm": Family("stablelm", GATED, packs=True),
    "cohere": Family("cohere", GATED, {"logit_scale": 0.25}, packs=True),
    "starcoder2": Family("starcoder2", {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"}, packs=True),
    "phi": Family("phi", {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, packs=True),
    # out_proj and dt_proj of state-space layers are left out: the layers multiply with their weights themselves.
    "mamba": Family("mamba", {"in_proj", "x_proj"}, {"state_size": 8}),
    "gemma": Family("gemma", GATED, {"head_dim": 16}, packs=True),
    "gpt-neo": Family(
        "gpt_neo",
        {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"},
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        packs=True,
    ),
    "gpt-bigcode": Family(
        "gpt_bigcode",
        {"c_attn", "c_proj", "c_fc"},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048},
        packs=True,
    ),
    "codegen": Family(
        "codegen",
        {"qkv_proj", "out_proj", "fc_in", "fc_out"},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 2048},
        packs=True,
    ),
    "mpt": Family("mpt", {"Wqkv", "out_proj", "up_proj", "down_proj"}, {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "olmo": Family("olmo", GATED, packs=True),
    "olmo3": Family("olmo3", GATED, {"sliding_window": 8}, packs=True),
    "cohere2": Family("cohere2", GATED, {"logit_scale": 0.25, "sliding_window": 8}, packs=True),
    "nemotron": Family("nemotron", GATED - {"gate_proj"}, packs=True),
    "glm": Family(
        "glm", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}, {"head_dim": 16}, packs=True
    ),
    "glm4": Family(
        "glm4", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}, {"head_dim": 16}, packs=True
    ),
    "exaone4": Family("exaone4", GATED, {"sliding_window": 8}, packs=True),
    "ernie4.5": Family("ernie4_5", GATED, {"head_dim": 16}, packs=True),
    "seed-oss": Family("seed_oss", GATED, {"head_dim": 16}, packs=True),
    "hunyuan": Family("hunyuan_v1_dense", GATED, {"head_dim": 16}, packs=True),
    "minicpm3": Family(
        "minicpm3",
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        {"num_key_value_heads": 4, **MLA},
        packs=True,
    ),
    "apertus": Family("apertus", GATED - {"gate_proj"}, packs=True),
    "arcee": Family("arcee", GATED - {"gate_proj"}, packs=True),
    "helium": Family("helium", GATED, {"head_dim": 16}, packs=True),
    "gemma4": Family(
        "gemma4_text",
        {*GATED, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"},
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 16,
        },
        packs=True,
    ),
    # Hybrids: attention in some layers, a state or a convolution along the sequence in the others.
    "qwen3.5": Family(
        "qwen3_5_text",
        {*GATED, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "jamba": Family(
        "jamba",
        {*GATED, "in_proj", "x_proj", "out_proj"},
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "initializer_range": 0.1,
        },
    ),
    "falcon-h1": Family(
        "falcon_h1",
        {*GATED, "in_proj"},
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "head_dim": 16},
    ),
    "bamba": Family(
        "bamba",
        {*GATED, "in_proj", "out_proj"},
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    ),
    "lfm2": Family(
        "lfm2",
        {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    ),
    "falcon-mamba": Family(
        "falcon_mamba",
        {"in_proj", "x_proj"},
        {"state_size": 8},
    ),
    "mamba2": Family(
        "mamba2",
        {"in_proj"},
        {"num_heads": 8, "head_dim": 16, "state_size": 8},
    ),
    "recurrent-gemma": Family(
        "recurrent_gemma",
        {*GATED, "linear_x", "linear_y", "linear_out"},
        {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 8},
    ),
    "olmo-hybrid": Family(
        "olmo_hybrid", {*GATED, "a_proj", "b_proj", "g_proj"}, {"layer_types": ["linear_attention", "full_attention"]}
    ),
    "t5": Family(
        "t5",
        {"q", "k", "v", "o", "wi", "wo"},
        {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "decoder_start_token_id": 0},
        task="seq2seq-lm",
    ),
    "bart": Family(
        "bart",
        BART,
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
        },
        task="seq2seq-lm",
    ),
    "bert": Family("bert", BERT, task="seq-cls"),
    "bert-tokens": Family("bert", BERT, task="token-cls"),
    "roberta": Family("roberta", BERT, task="seq-cls"),
    "distilbert": Family(
        "distilbert",
        {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        task="seq-cls",
    ),
    "deberta-v2": Family(
        "deberta-v2",
        {"query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj", "dense"},
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        task="seq-cls",
    ),
    "deberta-v2-tokens": Family("deberta-v2", {"query_proj", "key_proj", "value_proj", "dense"}, task="token-cls"),
    "llama-classifier": Family("llama", GATED, task="seq-cls"),
    "gpt2-classifier": Family(
        "gpt2",
        {"c_attn", "c_proj", "c_fc"},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048},
        task="seq-cls",
    ),
    "bart-classifier": Family(
        "bart",
        BART,
        {
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
        },
        task="seq-cls",
    ),
}
# Families with their own names for some options of COMMON, which would misread the common names.
OWN_NAMES = {"gpt2", "gpt_bigcode", "gpt_neo", "codegen", "mpt", "gptj", "t5", "bart", "distilbert", "falcon", "bloom"}


def config_of(family: Family) -> Any:
    common = dict(COMMON)
    if family.kind in OWN_NAMES:
        del common["num_key_value_heads"], common["intermediate_size"]
    if family.task in ("seq-cls", "token-cls"):
        common |= {"pad_token_id": 0}
    return AutoConfig.for_model(family.kind, **{**common, **family.options})


def write(family: Family, folder: Path) -> Path:
    """Write a pretrained checkpoint as on the hub: encoders have no task head."""
    torch.manual_seed(0)
    config = config_of(family)
    kind = {"seq-cls": "base", "token-cls": "base"}.get(family.task, family.task)
    if kind == "base":
        from transformers import AutoModel

        model = AutoModel.from_config(config)
    else:
        model = TASKS[family.task].auto_class.from_config(config)
    model.save_pretrained(folder)
    return folder


def rows_of(family: Family, lengths: Sequence[int]) -> zoo.MemoryRows:
    """Return random rows of `lengths` tokens with labels of the family's task."""
    rng = np.random.default_rng(0)
    rows = []
    for row in zoo.rows_of(lengths):
        labels: Any = row.labels
        if family.task == "seq-cls":
            labels = rng.integers(0, 3, 1).astype(np.int32)
        elif family.task == "token-cls":
            labels = np.where(rng.random(len(row.input_ids)) < 0.5, rng.integers(0, 3), IGNORE_INDEX).astype(np.int32)
            labels[0] = 1
        elif family.task == "seq2seq-lm":
            labels = rng.integers(3, 97, TARGET_TOKENS).astype(np.float64)
        if family.kind == "bart":
            row.input_ids[-1] = 2  # its classifier reads the state at the end token
        rows.append(Row(row.input_ids, labels, row.where))
    return zoo.MemoryRows(rows)


def collate_of(family: Family, *, packing: bool) -> Collate:
    return {
        "causal-lm": collate_packed if packing else collate_padded,
        "seq-cls": collate_sequence_classification,
        "token-cls": collate_token_classification,
        "seq2seq-lm": partial(collate_seq2seq, start_id=0),
    }[family.task]


def load(family: Family, folder: Path, **options: Any) -> LoadedBase:
    """Load the model as training does."""
    labels = LABELS if TASKS[family.task].is_classification else None
    return checkpoint(folder, task=family.task, labels=labels, pad_id=0).load(
        CPU, **{"dtype": torch.float32, **options}
    )
