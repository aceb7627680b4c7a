"""Whether rows of a base can be packed: its config shows layers that carry state from one packed row into the next.

Attention is separated by row (select_attention.py). State-space, linear-attention and convolution layers read earlier
tokens in another way: they keep rows apart only with GPU kernels that take the borders of the rows.
"""

import inspect
from importlib.util import find_spec

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Values of `layer_types` in a config whose layers see other tokens through attention only, or not at all.
STATELESS_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
    "mlp",
    "moe",
    "dense",
    "sparse",
}
# Architectures with attention alone whose rows mix all the same, though their `forward` takes position_ids.
FULL_MASK = "its attention mask is made without the positions, and covers all rows"
MIXES_ROWS = {
    "big_bird": "its attention reads random blocks of the sequence",
    "biogpt": FULL_MASK,
    "cpmant": FULL_MASK,
    "gpt_oss": FULL_MASK,
    "openai-gpt": FULL_MASK,
    "xglm": FULL_MASK,
}
# Architectures with stateful layers that hand the borders of the rows to their kernels.
ROW_KERNELS = {
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
}
CONVOLUTION_KERNELS = ("causal_conv1d",)
STATE_KERNELS = ("fla", "mamba_ssm")  # flash-linear-attention and mamba-ssm: one of them


def stateful_layers(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the kinds of layers of a causal language model that carry state along the sequence; empty if none do."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - STATELESS_LAYERS
    if not kinds and getattr(_causal_class(config), "_is_stateful", False):
        kinds = {"state-space"}
    return tuple(sorted(kinds))


def packing_obstacle(config: PretrainedConfig, device: torch.device) -> str | None:
    """Return why packed rows of this base would mix on `device`, None if nothing is known against packing.

    The answer comes from the config and the model's class, before any weight is loaded. `choose_attention` proves it on
    the loaded model.
    """
    if kinds := stateful_layers(config):
        layers = f"its {' and '.join(kinds)} layers carry state from one row into the next"
        if config.get_text_config().model_type not in ROW_KERNELS:
            return layers
        if device.type != "cuda":
            return f"{layers}; the kernels that keep rows apart run on a GPU"
        missing = [name for name in CONVOLUTION_KERNELS if find_spec(name) is None]
        if set(kinds) != {"conv"} and all(find_spec(name) is None for name in STATE_KERNELS):
            missing.append(" or ".join(STATE_KERNELS))
        return f"{layers}; the kernels that keep rows apart need {' and '.join(missing)}" if missing else None
    if (reason := MIXES_ROWS.get(config.model_type)) is not None:
        return reason
    if config.model_type == "falcon" and config.alibi:  # without ALiBi, see falcon_attention.py
        return FULL_MASK
    model_class = _causal_class(config)
    if model_class is not None and "position_ids" not in inspect.signature(model_class.forward).parameters:
        return "its forward takes no position_ids, so that it counts the tokens of all rows as one"
    return None


def _causal_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' causal language model of this config; None for code from the model's repository."""
    found: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found
