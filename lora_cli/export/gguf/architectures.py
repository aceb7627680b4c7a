"""Table of the model architectures that can be exported to GGUF: hyperparameters (metadata) and weight layout of each.

llama.cpp computes each architecture in one fixed way, while transformers lets the config choose. A config with an
unsupported setting is an error, because llama.cpp would silently compute a different model. The facts are from
llama.cpp's converter, src/models and src/llama-model.cpp. Tests compare llama.cpp with transformers on a model of each.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, RopeScalingType
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.model.multimodal import is_multimodal

Hyperparameter = tuple[str, Any]  # name of a GGUFWriter method without `add_`, and its argument
RowOrder = Callable[[PretrainedConfig], NDArray[np.int64]]  # row indices `[rows]` into the checkpoint's weight
UnsupportedSetting = tuple[str, object, object]  # key of the config, its value, the value that llama.cpp supports
SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


class Architecture(NamedTuple):
    """One architecture as llama.cpp defines it."""

    arch: MODEL_ARCH
    activation: tuple[str, ...]  # names that transformers has for the one activation that llama.cpp computes
    row_orders: Mapping[str, RowOrder] = {}  # by kind of layer: for each output row in GGUF, its row in the checkpoint
    transposed: frozenset[str] = frozenset()  # kinds of layers whose weights are stored as (in, out)
    norm_offset: float = 0.0  # added to norm weights: some checkpoints store them minus one
    always_tied: bool = False  # llama.cpp supports only a head that is tied to the embeddings
    extra_hyperparameters: Callable[[PretrainedConfig], Iterator[Hyperparameter]] | None = None
    unsupported: Callable[[PretrainedConfig], Iterator[UnsupportedSetting]] | None = None
    notes: Callable[[PretrainedConfig], Iterator[str]] | None = (
        None  # differences that are reported, but are not errors
    )


def find_architecture(config: PretrainedConfig) -> Architecture:
    """Return the entry of `config`'s architecture; for a multimodal model, that of its text decoder.

    Raises:
        LoraError: the architecture is not supported, or llama.cpp computes it differently from this config.
    """
    text_config = config.get_text_config()
    architecture = ARCHITECTURES.get(text_config.model_type)
    class_name = (config.architectures or [""])[0]
    is_decoder = class_name.endswith(("ForCausalLM", "LMHeadModel")) or (
        class_name.endswith("ForConditionalGeneration") and is_multimodal(config)
    )
    if architecture is None or not is_decoder:
        raise LoraError(
            f"--to gguf: {class_name or config.model_type} is not supported; supported: {', '.join(ARCHITECTURES)}",
            hint="llama.cpp's own converter may support it: python convert_hf_to_gguf.py MODEL --outfile OUT.gguf "
            "(MODEL: this model, or the output of lora merge)",
        )
    for key, value, supported in _unsupported_settings(text_config, architecture):
        raise LoraError(
            f"--to gguf: this {text_config.model_type} has {key}: {value}, but llama.cpp supports only {supported}",
            hint="llama.cpp would compute a different model: use --to safetensors or --to onnx",
        )
    return architecture


def hyperparameters(config: PretrainedConfig, architecture: Architecture) -> Iterator[Hyperparameter]:
    """Yield the metadata that describes the model's shape and computation to llama.cpp."""
    text_config = config.get_text_config()
    heads, hidden_size = text_config.num_attention_heads, text_config.hidden_size
    head_dim = _head_dim(text_config)
    yield "context_length", text_config.max_position_embeddings
    yield "embedding_length", hidden_size
    yield "block_count", text_config.num_hidden_layers
    yield "feed_forward_length", _feed_forward(text_config)
    yield "head_count", heads
    yield "head_count_kv", _key_value_heads(text_config)
    if getattr(text_config, "rms_norm_eps", None) is not None:
        yield "layer_norm_rms_eps", text_config.rms_norm_eps
    for name in ("layer_norm_epsilon", "norm_epsilon"):
        if getattr(text_config, name, None) is not None:
            yield "layer_norm_eps", getattr(text_config, name)
    yield "vocab_size", text_config.vocab_size
    if head_dim * heads != hidden_size or text_config.model_type.startswith("gemma"):
        yield "key_length", head_dim
        yield "value_length", head_dim
    yield from _rope_hyperparameters(text_config, head_dim)
    rope = _rope_parameters(text_config)
    if sections := rope.get("mrope_section"):  # rotary pairs of time, height, width; text has one position for all
        yield "rope_dimension_sections", [*sections, *[0] * (4 - len(sections))]
    vision = getattr(config, "vision_config", None)
    if deepstack := getattr(vision, "deepstack_visual_indexes", None):  # llama.cpp sizes image embeddings by it
        yield "num_deepstack_layers", len(deepstack)
    if architecture.extra_hyperparameters is not None:
        yield from architecture.extra_hyperparameters(text_config)


def extra_tensors(config: PretrainedConfig) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, `[rotary_dim / 2]` fp32): RoPE frequency divisors, which GGUF stores and transformers computes."""
    text_config = config.get_text_config()
    rope = _rope_parameters(text_config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, _head_dim(text_config))
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)


def notes(config: PretrainedConfig, architecture: Architecture) -> list[str]:
    """Return notes on how llama.cpp differs from transformers in long texts."""
    text_config = config.get_text_config()
    return list(architecture.notes(text_config)) if architecture.notes is not None else []


def _head_dim(text_config: PretrainedConfig) -> int:
    head_dim = getattr(text_config, "head_dim", None)
    return int(head_dim or text_config.hidden_size // text_config.num_attention_heads)


def _feed_forward(text_config: PretrainedConfig) -> int:
    name = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(text_config.model_type, "intermediate_size")
    return int(getattr(text_config, name) or 4 * text_config.hidden_size)


def _key_value_heads(text_config: PretrainedConfig) -> int:
    if text_config.model_type == "falcon":
        if text_config.new_decoder_architecture:
            return int(text_config.num_kv_heads)
        return 1 if text_config.multi_query else int(text_config.num_attention_heads)
    kv_heads = None if text_config.model_type == "gpt2" else getattr(text_config, "num_key_value_heads", None)
    return int(kv_heads or text_config.num_attention_heads)


def _rope_parameters(text_config: PretrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters; those of the full-attention layers, where they differ by kind of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    rope: dict[str, Any] = parameters.get("full_attention", parameters)
    return rope


def _rope_hyperparameters(text_config: PretrainedConfig, head_dim: int) -> Iterator[Hyperparameter]:
    rope = _rope_parameters(text_config)
    if not rope:
        return
    yield "rope_freq_base", rope["rope_theta"]
    yield "rope_dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0))
    rope_type = rope.get("rope_type", "default")
    if rope_type == "linear":
        yield "rope_scaling_type", RopeScalingType.LINEAR
        yield "rope_scaling_factor", rope["factor"]
    elif rope_type == "yarn":
        yield "rope_scaling_type", RopeScalingType.YARN
        yield "rope_scaling_factor", rope["factor"]
        yield "rope_scaling_orig_ctx_len", rope["original_max_position_embeddings"]
    elif rope_type == "longrope":
        original = rope.get("original_max_position_embeddings") or text_config.original_max_position_embeddings
        extension = text_config.max_position_embeddings / original
        yield "rope_scaling_orig_ctx_len", original
        yield (
            "rope_scaling_attn_factors",
            rope.get("attention_factor")
            or (math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0),
        )


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Return `[head_dim / 2]` fp32: 1 for short wavelengths, `factor` for long ones, smooth between (Llama 3.1)."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (rope[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = ((original / wavelengths - low) / (high - low)).clip(0, 1)  # 1: a short wavelength
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _interleaved_rope_rows(head_count: Callable[[PretrainedConfig], int]) -> RowOrder:
    """Return the row order that interleaves rotary pairs; transformers stores each head as two halves."""

    def rows(text_config: PretrainedConfig) -> NDArray[np.int64]:
        heads = head_count(text_config)
        return np.arange(heads * _head_dim(text_config)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    return rows


def _falcon_qkv_rows(text_config: PretrainedConfig) -> NDArray[np.int64]:
    """Return `[rows]` that sorts queries, keys, values; the checkpoint stores them by groups that share a key."""
    groups = _key_value_heads(text_config)
    group_size = text_config.num_attention_heads // groups  # query heads
    rows = np.arange(groups * (group_size + 2) * _head_dim(text_config)).reshape(groups, group_size + 2, -1)
    return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


INTERLEAVED_ROPE: Mapping[str, RowOrder] = {
    "q_proj": _interleaved_rope_rows(lambda config: int(config.num_attention_heads)),
    "k_proj": _interleaved_rope_rows(_key_value_heads),
}


def _granite_hyperparameters(text_config: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "attention_scale", text_config.attention_multiplier
    yield "embedding_scale", text_config.embedding_multiplier
    yield "residual_scale", text_config.residual_multiplier
    yield "logit_scale", text_config.logits_scaling


def _gemma2_hyperparameters(text_config: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "attn_logit_softcapping", text_config.attn_logit_softcapping
    yield "final_logit_softcapping", text_config.final_logit_softcapping
    yield "sliding_window", text_config.sliding_window


def _gemma3_hyperparameters(text_config: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "sliding_window", text_config.sliding_window
    if text_config.final_logit_softcapping:
        yield "final_logit_softcapping", text_config.final_logit_softcapping


def _phi3_hyperparameters(text_config: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "sliding_window", text_config.sliding_window or 0
    if _rope_parameters(text_config).get("rope_type") != "longrope":
        yield "rope_scaling_orig_ctx_len", text_config.original_max_position_embeddings


def _falcon_hyperparameters(text_config: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "tensor_data_layout", "jploski"


def _unsupported_settings(text_config: PretrainedConfig, architecture: Architecture) -> Iterator[UnsupportedSetting]:
    activation = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    activation = (
        activation or getattr(text_config, "activation_function", None) or getattr(text_config, "activation", None)
    )
    if activation not in architecture.activation:
        yield "hidden_act", activation, architecture.activation[0]
    rope_type = _rope_parameters(text_config).get("rope_type", "default")
    supported = ("default", "linear", "yarn", "llama3", *(("longrope",) if text_config.model_type == "phi3" else ()))
    if rope_type not in supported:
        yield "rope_type", rope_type, " or ".join(supported)
    if architecture.always_tied and not text_config.tie_word_embeddings:
        yield "tie_word_embeddings", text_config.tie_word_embeddings, True
    if architecture.unsupported is not None:
        yield from architecture.unsupported(text_config)


def _gpt2_unsupported(text_config: PretrainedConfig) -> Iterator[UnsupportedSetting]:
    for name, supported in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(text_config, name) is not supported:
            yield name, getattr(text_config, name), supported


def _falcon_unsupported(text_config: PretrainedConfig) -> Iterator[UnsupportedSetting]:
    parallel = text_config.parallel_attn or text_config.new_decoder_architecture
    for name, value, supported in (
        ("alibi", text_config.alibi, False),
        ("bias", text_config.bias, False),
        ("parallel_attn", parallel, True),
    ):
        if bool(value) is not supported:
            yield name, value, supported


def _smollm3_unsupported(text_config: PretrainedConfig) -> Iterator[UnsupportedSetting]:
    # In spite of its name, 1 in `no_rope_layers` means that the layer has RoPE.
    supported = [int((layer + 1) % 4 != 0) for layer in range(text_config.num_hidden_layers)]
    if list(text_config.no_rope_layers) != supported:
        yield "no_rope_layers", text_config.no_rope_layers, "a model without RoPE in every fourth layer"


def _gemma2_unsupported(text_config: PretrainedConfig) -> Iterator[UnsupportedSetting]:
    yield from _attention_scale(text_config, layers_of_27b=46)
    yield from _layer_types(text_config, full_every=2)


def _gemma3_unsupported(text_config: PretrainedConfig) -> Iterator[UnsupportedSetting]:
    yield from _attention_scale(text_config, layers_of_27b=62)
    yield from _layer_types(text_config, full_every=6)
    local = (text_config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_theta", 1e4) != 1e4 or local.get("rope_type", "default") != "default":
        yield "rope_parameters of its sliding-window layers", local, "rope_theta 10000"


def _attention_scale(text_config: PretrainedConfig, *, layers_of_27b: int) -> Iterator[UnsupportedSetting]:
    """Yield a scale other than head_dim, which llama.cpp uses except in the 27B model (known by its layer count)."""
    is_27b = text_config.num_hidden_layers == layers_of_27b
    supported = text_config.hidden_size // text_config.num_attention_heads if is_27b else _head_dim(text_config)
    if text_config.query_pre_attn_scalar != supported:
        yield "query_pre_attn_scalar", text_config.query_pre_attn_scalar, supported


def _layer_types(text_config: PretrainedConfig, *, full_every: int) -> Iterator[UnsupportedSetting]:
    supported = [
        "full_attention" if (layer + 1) % full_every == 0 else "sliding_attention"
        for layer in range(len(text_config.layer_types))
    ]
    if list(text_config.layer_types) != supported:
        yield "layer_types", text_config.layer_types, f"full attention in every {full_every}th layer"


def _sliding_window_note(text_config: PretrainedConfig) -> Iterator[str]:
    window = getattr(text_config, "sliding_window", None)
    has_window = window and getattr(text_config, "use_sliding_window", True)
    if has_window and window < text_config.max_position_embeddings:
        yield (
            f"llama.cpp computes full attention for {text_config.model_type}, transformers a sliding window of "
            f"{window:,} tokens: longer texts give different results"
        )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, SILU, INTERLEAVED_ROPE),
    "mistral": Architecture(MODEL_ARCH.LLAMA, SILU, INTERLEAVED_ROPE, notes=_sliding_window_note),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, SILU, notes=_sliding_window_note),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, SILU, notes=_sliding_window_note),
    "qwen2_vl_text": Architecture(MODEL_ARCH.QWEN2VL, SILU, notes=_sliding_window_note),
    "qwen2_5_vl_text": Architecture(MODEL_ARCH.QWEN2VL, SILU, notes=_sliding_window_note),
    "qwen3_vl_text": Architecture(MODEL_ARCH.QWEN3VL, SILU),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2,
        GELU_TANH,
        norm_offset=1.0,
        always_tied=True,
        extra_hyperparameters=_gemma2_hyperparameters,
        unsupported=_gemma2_unsupported,
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3,
        GELU_TANH,
        norm_offset=1.0,
        extra_hyperparameters=_gemma3_hyperparameters,
        unsupported=_gemma3_unsupported,
    ),
    "phi3": Architecture(
        MODEL_ARCH.PHI3, SILU, extra_hyperparameters=_phi3_hyperparameters, notes=_sliding_window_note
    ),
    "falcon": Architecture(
        MODEL_ARCH.FALCON,
        ("gelu",),
        {"query_key_value": _falcon_qkv_rows},
        extra_hyperparameters=_falcon_hyperparameters,
        unsupported=_falcon_unsupported,
    ),
    "gpt2": Architecture(
        MODEL_ARCH.GPT2, GELU_TANH, transposed=frozenset({"c_attn", "c_proj", "c_fc"}), unsupported=_gpt2_unsupported
    ),
    "starcoder2": Architecture(MODEL_ARCH.STARCODER2, GELU_TANH, notes=_sliding_window_note),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, SILU, INTERLEAVED_ROPE, unsupported=_smollm3_unsupported),
    "granite": Architecture(MODEL_ARCH.GRANITE, SILU, INTERLEAVED_ROPE, extra_hyperparameters=_granite_hyperparameters),
    "olmo2": Architecture(MODEL_ARCH.OLMO2, SILU),
}
