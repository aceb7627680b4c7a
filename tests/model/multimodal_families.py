"""Tiny random checkpoints of multimodal families: a text decoder next to a vision or audio tower and a projector."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests.model.families import GATED
from tests.model.zoo import COMMON

NONE: Mapping[str, Any] = MappingProxyType({})
TEXT = {**COMMON, "head_dim": 16, "tie_word_embeddings": False}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP, CLIP = {**TOWER, "model_type": "siglip_vision_model"}, {**TOWER, "model_type": "clip_vision_model"}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
QWEN3_TOWER = {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
# Ids of the tokens that stand for images; the default ids are beyond the tiny vocabulary.
IMAGE = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class Multimodal(NamedTuple):
    """One architecture."""

    kind: str  # transformers' model_type
    towers: Mapping[str, int]  # linear layers outside the decoder, by the kind that is told
    text: Mapping[str, Any] = NONE  # options of its decoder
    options: Mapping[str, Any] = NONE  # options of the whole
    layers: frozenset[str] = frozenset(GATED)  # kinds of linear layers that all-linear adapts
    packs: bool = True


QWEN_LAYERS = frozenset(ATTENTION | {"gate_up_proj", "down_proj"})
MULTIMODAL: dict[str, Multimodal] = {
    "gemma3": Multimodal(
        "gemma3",
        {"vision tower": 15},
        {**WINDOWED, "query_pre_attn_scalar": 16},
        {"vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91},
    ),
    "gemma4": Multimodal(
        "gemma4",
        {},
        {**WINDOWED, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
        layers=frozenset(GATED | {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}),
    ),
    "qwen2-vl": Multimodal("qwen2_vl", {"vision tower": 10}, MROPE, {"vision_config": QWEN_TOWER, **IMAGE}),
    "qwen2.5-vl": Multimodal("qwen2_5_vl", {"vision tower": 12}, MROPE, {"vision_config": QWEN_TOWER, **IMAGE}),
    "qwen3-vl": Multimodal("qwen3_vl", {"vision tower": 12}, MROPE, {"vision_config": QWEN3_TOWER, **IMAGE}),
    "qwen3-vl-moe": Multimodal(
        "qwen3_vl_moe",
        {"vision tower": 12},
        {**MROPE, **MOE},
        {"vision_config": QWEN3_TOWER, **IMAGE},
        layers=frozenset(ATTENTION | {"gate_up_proj", "down_proj"}),
    ),
    "mistral3": Multimodal(
        "mistral3",
        {"vision tower": 14, "projector": 3},
        {"model_type": "mistral", "sliding_window": None},
        {
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 90,
            "tie_word_embeddings": False,
        },
    ),
    "glm4v": Multimodal(
        "glm4v", {"vision tower": 14}, MROPE, {"vision_config": QWEN_TOWER, **IMAGE}, layers=QWEN_LAYERS
    ),
    "internvl": Multimodal(
        "internvl",
        {"vision tower": 12, "projector": 2},
        {"model_type": "qwen2"},
        {"vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]}, "image_token_id": 90},
    ),
    "lfm2-vl": Multimodal(
        "lfm2_vl",
        {"vision tower": 16, "projector": 2},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        {"vision_config": {**TOWER, "num_patches": 16, "model_type": "siglip2_vision_model"}, "image_token_id": 90},
        layers=frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"}),
        packs=False,
    ),
    "idefics3": Multimodal(
        "idefics3",
        {"vision tower": 12, "projector": 1},
        {"model_type": "llama"},
        {"vision_config": TOWER, "image_token_id": 90},
    ),
    "smolvlm": Multimodal(
        "smolvlm",
        {"vision tower": 12, "projector": 1},
        {"model_type": "llama"},
        {"vision_config": TOWER, "image_token_id": 90},
    ),
    "llava": Multimodal(
        "llava",
        {"vision tower": 12, "projector": 2},
        {"model_type": "llama"},
        {"vision_config": CLIP, "image_token_index": 90},
    ),
    "llava-next": Multimodal(
        "llava_next",
        {"vision tower": 12, "projector": 2},
        {"model_type": "llama"},
        {"vision_config": CLIP, "image_token_index": 90, "image_grid_pinpoints": [[28, 28]]},
    ),
    "llava-onevision": Multimodal(
        "llava_onevision",
        {"vision tower": 15, "projector": 2},
        {"model_type": "qwen2"},
        {"vision_config": SIGLIP, "image_token_index": 90, "image_grid_pinpoints": [[28, 28]]},
    ),
    "aya-vision": Multimodal(
        "aya_vision",
        {"vision tower": 15, "projector": 2},
        {"model_type": "cohere2", "logit_scale": 0.25, **WINDOWED},
        {"vision_config": SIGLIP, "image_token_index": 90},
    ),
    "llama4": Multimodal(
        "llama4",
        {"vision tower": 15, "projector": 1},
        {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
        {
            "vision_config": {
                **TOWER,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "image_token_index": 90,
        },
        layers=frozenset(GATED | {"experts", "router"}),
    ),
    "mllama": Multimodal(
        "mllama",
        {"vision tower": 18, "projector": 1, "cross-attention to images": 7},
        {"cross_attention_layers": [1]},
        {
            "vision_config": {
                **TOWER,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": 90,
        },
    ),
    "qwen2-audio": Multimodal(
        "qwen2_audio",
        {"audio tower": 12, "projector": 1},
        {"model_type": "qwen2"},
        {
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "num_mel_bins": 16,
            },
            "audio_token_index": 90,
        },
    ),
}


def config_of(family: Multimodal, **options: Any) -> Any:
    return AutoConfig.for_model(family.kind, text_config={**TEXT, **family.text}, **{**family.options, **options})


def write(family: Multimodal, folder: Path, **options: Any) -> Path:
    """Write a checkpoint as on the hub: with its towers."""
    torch.manual_seed(0)
    config = config_of(family, **options)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(folder)
    return folder
