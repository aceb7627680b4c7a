"""The architectures that can be written as GGUF: what llama.cpp wants to know of each, and how it lays weights out.

llama.cpp computes an architecture in one way, where transformers lets a config choose: a config that chooses another
way is refused, as llama.cpp would compute another model without a word. Facts are from llama.cpp's converter and
from its src/models and src/llama-model.cpp; tests run a model of each in llama.cpp beside transformers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, RopeScalingType
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lora_cli.errors import LoraError

Hyperparameter = tuple[str, Any]  # the part of a method's name of GGUFWriter after `add_`, and what it is given
RowOrder = Callable[[PretrainedConfig], NDArray[np.int64]]
SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


class Architecture(NamedTuple):
    """One architecture as llama.cpp has it."""

    arch: MODEL_ARCH
    activation: tuple[str, ...]  # names of the one it computes
    reordered: Mapping[str, RowOrder] = {}  # kind of layer: for each output row in GGUF, the one in the checkpoint
    turned: frozenset[str] = frozenset()  # kinds of layers that are stored (in, out)
    norms_less_one: bool = False  # the checkpoint holds norms as their distance from one
    always_tied: bool = False  # llama.cpp has no head of its own for it
    more: Callable[[PretrainedConfig], Iterator[Hyperparameter]] | None = None  # beyond what `parameters` finds for all
    unlike: Callable[[PretrainedConfig], Iterator[tuple[str, object, object]]] | None = None  # (key, found, what fits)
    notes: Callable[[PretrainedConfig], Iterator[str]] | None = (
        None  # where llama.cpp computes something else in the end
    )


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The entry of `config`'s architecture.

    Raises:
        LoraError: there is none, or llama.cpp computes it otherwise than this config wants.
    """
    text = config.get_text_config()
    found = ARCHITECTURES.get(text.model_type)
    named = (config.architectures or [""])[0]
    if found is None or not named.endswith(("ForCausalLM", "LMHeadModel")):
        raise LoraError(
            f"--to gguf: {named or config.model_type} is not covered; what is: {', '.join(ARCHITECTURES)}",
            hint="llama.cpp's own converter may know it: python convert_hf_to_gguf.py MODEL --outfile OUT.gguf "
            "(MODEL: this model, or what lora merge writes)",
        )
    for key, value, fits in _unsupported(text, found):
        raise LoraError(
            f"--to gguf: this {text.model_type} has {key}: {value}, and llama.cpp computes it with {fits}",
            hint="it would be another model: use --to safetensors or --to onnx",
        )
    return found


def hyperparameters(config: PretrainedConfig, architecture: Architecture) -> Iterator[Hyperparameter]:
    """What llama.cpp has to know of the model's shape and computation."""
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.hidden_size
    head_dim = _head_dim(text)
    yield "context_length", text.max_position_embeddings
    yield "embedding_length", width
    yield "block_count", text.num_hidden_layers
    yield "feed_forward_length", _feed_forward(text)
    yield "head_count", heads
    yield "head_count_kv", _key_value_heads(text)
    if getattr(text, "rms_norm_eps", None) is not None:
        yield "layer_norm_rms_eps", text.rms_norm_eps
    for name in ("layer_norm_epsilon", "norm_epsilon"):
        if getattr(text, name, None) is not None:
            yield "layer_norm_eps", getattr(text, name)
    yield "vocab_size", text.vocab_size
    if head_dim * heads != width or text.model_type.startswith("gemma"):
        yield "key_length", head_dim
        yield "value_length", head_dim
    yield from _rope(text, head_dim)
    if architecture.more is not None:
        yield from architecture.more(text)


def extra_tensors(config: PretrainedConfig) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Tensors that the checkpoint computes and llama.cpp reads: factors by which rotary frequencies are divided."""
    text = config.get_text_config()
    rope = _rope_parameters(text)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, _head_dim(text))
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)


def notes(config: PretrainedConfig, architecture: Architecture) -> list[str]:
    """What llama.cpp does otherwise than transformers, where that shows late in a long text."""
    text = config.get_text_config()
    return list(architecture.notes(text)) if architecture.notes is not None else []


def _head_dim(text: PretrainedConfig) -> int:
    found = getattr(text, "head_dim", None)
    return int(found or text.hidden_size // text.num_attention_heads)


def _feed_forward(text: PretrainedConfig) -> int:
    name = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(text.model_type, "intermediate_size")
    return int(getattr(text, name) or 4 * text.hidden_size)


def _key_value_heads(text: PretrainedConfig) -> int:
    if text.model_type == "falcon":
        if text.new_decoder_architecture:
            return int(text.num_kv_heads)
        return 1 if text.multi_query else int(text.num_attention_heads)
    shared = None if text.model_type == "gpt2" else getattr(text, "num_key_value_heads", None)
    return int(shared or text.num_attention_heads)


def _rope_parameters(text: PretrainedConfig) -> dict[str, Any]:
    """Of the layers that attend to everything, where kinds of layers differ."""
    found = getattr(text, "rope_parameters", None) or {}
    rope: dict[str, Any] = found.get("full_attention", found)
    return rope


def _rope(text: PretrainedConfig, head_dim: int) -> Iterator[Hyperparameter]:
    rope = _rope_parameters(text)
    if not rope:
        return
    yield "rope_freq_base", rope["rope_theta"]
    yield "rope_dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        yield "rope_scaling_type", RopeScalingType.LINEAR
        yield "rope_scaling_factor", rope["factor"]
    elif kind == "yarn":
        yield "rope_scaling_type", RopeScalingType.YARN
        yield "rope_scaling_factor", rope["factor"]
        yield "rope_scaling_orig_ctx_len", rope["original_max_position_embeddings"]
    elif kind == "longrope":
        original = rope.get("original_max_position_embeddings") or text.original_max_position_embeddings
        longer = text.max_position_embeddings / original
        yield "rope_scaling_orig_ctx_len", original
        yield (
            "rope_scaling_attn_factors",
            rope.get("attention_factor")
            or (math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0),
        )


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """(head_dim / 2,): 1 where a wave is short, `factor` where it is long, and a slope in between (as Llama 3.1)."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (rope[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = ((original / waves - low) / (high - low)).clip(0, 1)  # 1: a short wave
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _pairs(heads: Callable[[PretrainedConfig], int]) -> RowOrder:
    """Rotary pairs beside each other, where transformers has the first halves of all before the second ones."""

    def rows(text: PretrainedConfig) -> NDArray[np.int64]:
        count = heads(text)
        return np.arange(count * _head_dim(text)).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)

    return rows


def _falcon_rows(text: PretrainedConfig) -> NDArray[np.int64]:
    """All queries, then all keys, then all values, where the checkpoint has them by groups that share a key."""
    groups = _key_value_heads(text)
    shared = text.num_attention_heads // groups
    rows = np.arange(groups * (shared + 2) * _head_dim(text)).reshape(groups, shared + 2, -1)
    return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


PAIRS: Mapping[str, RowOrder] = {
    "q_proj": _pairs(lambda text: int(text.num_attention_heads)),
    "k_proj": _pairs(_key_value_heads),
}


def _granite(text: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "attention_scale", text.attention_multiplier
    yield "embedding_scale", text.embedding_multiplier
    yield "residual_scale", text.residual_multiplier
    yield "logit_scale", text.logits_scaling


def _gemma2(text: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "attn_logit_softcapping", text.attn_logit_softcapping
    yield "final_logit_softcapping", text.final_logit_softcapping
    yield "sliding_window", text.sliding_window


def _gemma3(text: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "sliding_window", text.sliding_window
    if text.final_logit_softcapping:
        yield "final_logit_softcapping", text.final_logit_softcapping


def _phi3(text: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "sliding_window", text.sliding_window or 0
    if _rope_parameters(text).get("rope_type") != "longrope":
        yield "rope_scaling_orig_ctx_len", text.original_max_position_embeddings


def _falcon(text: PretrainedConfig) -> Iterator[Hyperparameter]:
    yield "tensor_data_layout", "jploski"


def _unsupported(text: PretrainedConfig, architecture: Architecture) -> Iterator[tuple[str, object, object]]:
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    activation = activation or getattr(text, "activation_function", None) or getattr(text, "activation", None)
    if activation not in architecture.activation:
        yield "hidden_act", activation, architecture.activation[0]
    kind = _rope_parameters(text).get("rope_type", "default")
    known = ("default", "linear", "yarn", "llama3", *(("longrope",) if text.model_type == "phi3" else ()))
    if kind not in known:
        yield "rope_type", kind, " or ".join(known)
    if architecture.always_tied and not text.tie_word_embeddings:
        yield "a head apart from its embeddings", True, "one that is tied to them"
    if architecture.unlike is not None:
        yield from architecture.unlike(text)


def _gpt2_unlike(text: PretrainedConfig) -> Iterator[tuple[str, object, object]]:
    for name, fits in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(text, name) is not fits:
            yield name, getattr(text, name), fits


def _falcon_unlike(text: PretrainedConfig) -> Iterator[tuple[str, object, object]]:
    parallel = text.parallel_attn or text.new_decoder_architecture
    for name, found, fits in (
        ("alibi", text.alibi, False),
        ("bias", text.bias, False),
        ("parallel_attn", parallel, True),
    ):
        if bool(found) is not fits:
            yield name, found, fits


def _smollm3_unlike(text: PretrainedConfig) -> Iterator[tuple[str, object, object]]:
    rotating = [int((layer + 1) % 4 != 0) for layer in range(text.num_hidden_layers)]
    if list(text.no_rope_layers) != rotating:
        yield "no_rope_layers", text.no_rope_layers, "no rotation in every fourth layer"


def _gemma2_unlike(text: PretrainedConfig) -> Iterator[tuple[str, object, object]]:
    yield from _attention_scale(text, widest=46)
    yield from _layers(text, every=2)


def _gemma3_unlike(text: PretrainedConfig) -> Iterator[tuple[str, object, object]]:
    yield from _attention_scale(text, widest=62)
    yield from _layers(text, every=6)
    local = (text.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_theta", 1e4) != 1e4 or local.get("rope_type", "default") != "default":
        yield "rope_parameters of its local layers", local, "rope_theta 10000"


def _attention_scale(text: PretrainedConfig, *, widest: int) -> Iterator[tuple[str, object, object]]:
    """llama.cpp takes a head's width, but for the 27B model, which it knows by its number of layers."""
    large = text.num_hidden_layers == widest
    fits = text.hidden_size // text.num_attention_heads if large else _head_dim(text)
    if text.query_pre_attn_scalar != fits:
        yield "query_pre_attn_scalar", text.query_pre_attn_scalar, fits


def _layers(text: PretrainedConfig, *, every: int) -> Iterator[tuple[str, object, object]]:
    fits = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(len(text.layer_types))
    ]
    if list(text.layer_types) != fits:
        yield "layer_types", text.layer_types, f"full attention in every {every}th layer"


def _whole_attention(text: PretrainedConfig) -> Iterator[str]:
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < text.max_position_embeddings:
        yield (
            f"llama.cpp lets every token of a {text.model_type} see all before it, where transformers ends at "
            f"{window:,}: beyond that length they differ"
        )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, SILU, PAIRS),
    "mistral": Architecture(MODEL_ARCH.LLAMA, SILU, PAIRS, notes=_whole_attention),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, SILU, notes=_whole_attention),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, SILU, notes=_whole_attention),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2, GELU_TANH, norms_less_one=True, always_tied=True, more=_gemma2, unlike=_gemma2_unlike
    ),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, GELU_TANH, norms_less_one=True, more=_gemma3, unlike=_gemma3_unlike),
    "phi3": Architecture(MODEL_ARCH.PHI3, SILU, more=_phi3, notes=_whole_attention),
    "falcon": Architecture(
        MODEL_ARCH.FALCON, ("gelu",), {"query_key_value": _falcon_rows}, more=_falcon, unlike=_falcon_unlike
    ),
    "gpt2": Architecture(
        MODEL_ARCH.GPT2, GELU_TANH, turned=frozenset({"c_attn", "c_proj", "c_fc"}), unlike=_gpt2_unlike
    ),
    "starcoder2": Architecture(MODEL_ARCH.STARCODER2, GELU_TANH, notes=_whole_attention),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, SILU, PAIRS, unlike=_smollm3_unlike),
    "granite": Architecture(MODEL_ARCH.GRANITE, SILU, PAIRS, more=_granite),
    "olmo2": Architecture(MODEL_ARCH.OLMO2, SILU),
}
