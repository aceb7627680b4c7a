"""Values of other tools in this tool's names: optimizers, target modules, dtypes, chat templates. No torch."""

import re
from typing import Any, NamedTuple, get_args

from lora_cli.convert.config import Unreadable, as_list, as_number, show
from lora_cli.convert.draft import Draft
from lora_cli.recipe.other_tools import VALUES
from lora_cli.recipe.training_section import OptimizerName

# Optimizers that are the same up to how they store their state: the name here, and the difference.
SIMILAR_OPTIMIZERS: dict[str, tuple[str, str]] = {
    "adamw_torch_8bit": ("adamw-8bit", "torchao's 8-bit moments are bitsandbytes' here"),
    "ao_adamw_8bit": ("adamw-8bit", "torchao's 8-bit moments are bitsandbytes' here"),
    "pagedadamw8bit": ("paged-adamw-8bit", ""),
    "pagedadamw": ("paged-adamw", ""),
    "adamw8bit": ("adamw-8bit", ""),
    "pagedadamw32bit": ("paged-adamw", ""),
    "adamwfp8": ("adamw-8bit", "torchao's fp8 moments are bitsandbytes' 8-bit moments here"),
    "ao_adamw_fp8": ("adamw-8bit", "torchao's fp8 moments are bitsandbytes' 8-bit moments here"),
    "adamw_anyprecision": ("adamw", ""),
    "adamw_apex_fused": ("adamw", ""),
    "adamw_torch_npu_fused": ("adamw", ""),
    "adamw_torch_xla": ("adamw", ""),
    "optimi_adamw": ("adamw", "optimi's Kahan summation is not needed: adapters are trained in float32"),
    "stochasticrounding_adamw": ("adamw", "adapters are trained in float32"),
    "muonclip": ("muon", ""),
}


def carry_optimizer(draft: Draft, key: str, *, default: str, why: str = "") -> None:
    """Carry an optimizer by its name; one that is not offered becomes AdamW if the user accepts it."""
    value = draft.config.text(key)
    if value is None:
        draft.assume("training.optimizer", default, why)
        return
    name = value.rpartition(".")[2].removeprefix("OptimizerNames.").lower()
    known = get_args(OptimizerName)
    ours = VALUES.get(name, name).replace("_", "-")
    if ours in known:
        draft.carry(key, "training.optimizer", ours)
    elif name.replace("-", "_") in SIMILAR_OPTIMIZERS:
        ours, note = SIMILAR_OPTIMIZERS[name.replace("-", "_")]
        draft.carry(key, "training.optimizer", ours, note)
    else:
        draft.refuse(key, f"there is no optimizer {show(value)}; accepted: adamw")
    if ours == "schedule-free-adamw":
        draft.put("training.schedule", "constant", "schedule-free AdamW has no decay")


def carry_torch_decay(draft: Draft, key: str, optimizer: str) -> None:
    """Carry the weight decay of torch's optimizers: by default 0.01; that of Adam, by default 0, is in the gradient."""
    decay = draft.config.number(key)
    coupled = optimizer.rpartition(".")[2].lower() == "adam"
    if coupled and decay:
        draft.refuse(key, "Adam's decay is a part of the gradient; accepted: AdamW's")
    if decay is not None:
        draft.carry(key, "training.weight_decay", float(decay))
    elif not coupled:
        draft.assume("training.weight_decay", 0.01, "of torch's AdamW")


def carry_targets(
    draft: Draft, key: str, *, default: Any = None, why: str = "", rename: dict[str, str] | None = None
) -> None:
    """Carry target modules: `all`, a list, or a text with commas; embeddings become fully trained modules."""
    value = draft.config.get(key)
    if value in (None, "", []):
        if default is not None:
            draft.assume("adapter.target_modules", default, why)
        return
    if isinstance(value, str) and is_all_linear(value):
        draft.carry(key, "adapter.target_modules", "all-linear")
        return
    if isinstance(value, str) and re.search(r"[\\|()*^$\[\]?]", value):
        draft.carry(key, "adapter.target_modules", value)
        return
    names = [(rename or {}).get(str(name), str(name)) for name in as_list(value)]
    if any(map(is_all_linear, names)):
        draft.carry(key, "adapter.target_modules", "all-linear")
        return
    full = [name for name in names if name in ("embed_tokens", "lm_head")]
    if draft.tool == "unsloth" and full:
        others = [name for name in names if name not in full]
        draft.carry(key, "adapter.target_modules", others, f"unsloth trains {' and '.join(full)} fully")
        draft.put("adapter.modules_to_save", full, f"{key}: unsloth trains these fully")
        return
    draft.carry(key, "adapter.target_modules", names)


def is_all_linear(name: str) -> bool:
    """Return whether a text stands for every linear layer."""
    return name.lower().replace("_", "-") in ("all", "all-linear", "alllinear")


FALCON = r"falcon(?!-?(3|e-|h1|mamba))"  # Falcon3 and later ones have other layers
# By the first pattern that is found in the lower-case name of a model (`dolphin` is no phi); PEFT's table of types.
PEFT_TARGETS = (
    (rf"{FALCON}|pythia|neox|bloom|chatglm", ["query_key_value"]),
    (r"gpt2|starcoder(?!2)|santacoder", ["c_attn"]),
    (r"(?<![a-z])phi-?[34]", ["qkv_proj"]),
    (r"(?<![a-z])phi", ["q_proj", "v_proj", "fc1", "fc2"]),
    (r"(?<![a-z])mpt", ["Wqkv"]),
)


def peft_targets(model: str | None) -> list[str]:
    """Return the modules that PEFT adapts by default in a model of this name (its table of architectures)."""
    name = (model or "").lower()
    return next((list(targets) for pattern, targets in PEFT_TARGETS if re.search(pattern, name)), ["q_proj", "v_proj"])


DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16", "bf16-true"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half", "16-true"), "float16"),
    **dict.fromkeys(("fp32", "float32", "float", "32-true", "32"), "float32"),
    **dict.fromkeys(("bf16-mixed",), "bfloat16"),
    **dict.fromkeys(("16-mixed",), "float16"),
}


def carry_dtype(draft: Draft, key: str) -> None:
    """Carry the dtype of the base; `auto` and null are the default."""
    value = draft.config.text(key)
    if value is None or value == "auto":
        draft.same(key, "model.dtype: auto is the default")
        return
    name = value.rpartition(".")[2].lower()
    if name not in DTYPES:
        draft.refuse(key, "model.dtype is bfloat16, float16 or float32; accepted: auto")
        return
    note = "the frozen base has 16 bits; the adapter is trained in float32" if "mixed" in name else ""
    draft.carry(key, "model.dtype", DTYPES[name], note)


def carry_precision(draft: Draft) -> None:
    """Carry the switches bf16 and fp16 of transformers' trainer and of axolotl."""
    config = draft.config
    for key, dtype in (
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("pure_bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
    ):
        value = config.raw(key)
        if isinstance(value, Unreadable) or value in ("auto", "full"):
            draft.same(
                key,
                "model.dtype: auto is bfloat16 where the device computes in it, else float16 on a GPU",
                computed=True,
            )
        elif value is None or not config.switch(key):
            draft.same(key, "asks for nothing")
        elif "model.dtype" in draft.values:
            draft.same(key, "as model.dtype")
        else:
            draft.carry(key, "model.dtype", dtype)


class Family(NamedTuple):
    """A model family: how its names are found, and the names of its modules and special tokens."""

    pattern: str
    tokens: dict[str, str]
    attention: dict[str, str]  # q, k, v, o: the module
    mlp: tuple[str, ...]


_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END_OF_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_SPLIT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = dict.fromkeys("qkv", "query_key_value")
# The first whose pattern is found in the lower-case name of the model.
FAMILIES: tuple[Family, ...] = (
    Family(
        FALCON,
        _END_OF_TEXT,
        {**_FUSED, "o": "dense"},
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    Family(
        r"pythia|neox|stablelm-(base|tuned)-alpha|redpajama|dolly",
        _END_OF_TEXT,
        {**_FUSED, "o": "dense"},
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    Family(
        r"(?<![a-z])phi-?[34]",
        _SENTENCEPIECE,
        {**dict.fromkeys("qkv", "qkv_proj"), "o": "o_proj"},
        ("gate_up_proj", "down_proj"),
    ),
    Family(r"(?<![a-z])phi", _END_OF_TEXT, {**_SPLIT, "o": "dense"}, ("fc1", "fc2")),
    Family(r"gpt-?j|stablelm|starcoder|btlm|cerebras|replit|mpt", _END_OF_TEXT, _SPLIT, _GATED),
    Family(r"llama-?3|llama-3", {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, _SPLIT, _GATED),
    Family(r"gemma", {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}, _SPLIT, _GATED),
    Family(r"qwen", {"eos_token": "<|endoftext|>"}, _SPLIT, _GATED),
    Family(r"llama|mistral|mixtral|yi-|vicuna|zephyr", _SENTENCEPIECE, _SPLIT, _GATED),
)
# Tokens with which chat templates end a turn.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|endofturn|>",
    "<turn|>",
    "<|return|>",
)


def family_of(model: str | None) -> Family:
    """Return the family of a model by its name; the common module names without special tokens if it is unknown."""
    name = (model or "").lower()
    return next((each for each in FAMILIES if re.search(each.pattern, name)), Family("", {}, _SPLIT, _GATED))


def positive(value: Any) -> float | None:
    """Return a number above 0, None for others: trainers write -1 or 0 for a limit that is not set."""
    number = as_number(value)
    return number if number is not None and number > 0 else None
