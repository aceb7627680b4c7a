"""Hints for keys of other tools that depend on the value: `stage: dpo`, `load_in_8bit: false`. No torch.

A value that asks for nothing (false, null, none) needs no replacement, unless this tool's default is another.
"""

from lora_cli.recipe.other_tool_trackers import BY_VALUE_TRACKERS
from lora_cli.recipe.problem import join_words, shorten
from lora_cli.recipe.yaml_tree import PlainValue

NOTHING = "nothing"  # false, null, 0, none, no, off, disabled, or an empty text
OTHER = "other"  # every other value

OTHER_TASK = "{value} is another task: `lora train` does supervised fine-tuning on good answers only"
NOT_FULL = "full fine-tuning is not supported: only adapters are trained"
DEFAULT_LOSS = "remove it: loss on the assistant's turns is the default of data.loss_on"
LOSS_ON_ALL = "write `data: {{loss_on: all}}`"
NO_QUANTIZATION = "remove it: no quantization is the default"
FLASH = "write `model: {{attention: flash_attention_2}}`"
BITSANDBYTES = "remove it: quantization.bits uses bitsandbytes"
OWN_TEMPLATE = "remove it: the tokenizer's own template is the default"
LAST_CHECKPOINT = "write `training: {{save_every: null}}`: only the last step is saved"
LAST_EVALUATION = "write `training: {{eval_every: null}}`, and `data: {{eval: null}}` for no evaluation at all"
NO_EVALUATION = "write `data: {{eval: null}}`: by default, rows are held out of train"

_BITS = {
    "4": "write `quantization: {{bits: 4}}`",
    "8": "write `quantization: {{bits: 8}}`",
    NOTHING: NO_QUANTIZATION,
    OTHER: "write `quantization: {{bits: 4}}` or 8: {value} bits are not supported",
}
_TUNER = {
    "lora": "remove it: lora is the default of adapter.method",
    "qlora": "write `quantization: {{bits: 4}}`; lora is the default of adapter.method",
    "full": NOT_FULL,
    "freeze": NOT_FULL,
}
_SWITCH_OF_ADAPTER = {"true": "remove it: an adapter is always trained", NOTHING: NOT_FULL}
_OTHER_TASK = {NOTHING: "remove it: supervised fine-tuning is what `lora train` does", OTHER: OTHER_TASK}

# Other tools' keys, as in other_tools.py, and their fixes by value. `{value}` is the value.
_GROUPS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "stage",
        {
            **_OTHER_TASK,
            "sft": "remove it: supervised fine-tuning is what `lora train` does",
            "pt": "write `data: {{format: text}}` to train on documents",
        },
    ),
    ("rl rlhf_type rl_type trainer_type", _OTHER_TASK),
    ("load_in_4bit", {"true": _BITS["4"], NOTHING: NO_QUANTIZATION}),
    ("load_in_8bit", {"true": _BITS["8"], NOTHING: NO_QUANTIZATION}),
    ("quantization_bit quant_bits", _BITS),
    (
        "quantization_method quant_method",
        {
            NOTHING: NO_QUANTIZATION,
            "bnb": BITSANDBYTES,
            "bitsandbytes": BITSANDBYTES,
            OTHER: "remove it: a base that is quantized with {value} is recognized by its config",
        },
    ),
    ("quantization_config bnb_config", {NOTHING: NO_QUANTIZATION}),
    ("finetuning_type train_type tuner_type sft_type tuning_type", _TUNER),
    ("lora peft use_peft use_lora lora_config peft_config", _SWITCH_OF_ADAPTER),
    ("full_finetuning", {NOTHING: "remove it: only adapters are trained"}),
    ("lora_target_linear", {NOTHING: "list the modules in adapter.target_modules; all-linear is the default"}),
    ("lora_target", {"all": "write `adapter: {{target_modules: all-linear}}` (the default)"}),
    ("apply_lora_to_mlp", {NOTHING: "list the other modules in adapter.target_modules; all-linear is the default"}),
    ("apply_lora_to_output", {NOTHING: "remove it: all-linear, the default, leaves the output head out"}),
    (
        "bf16",
        {
            "auto": "remove it: model.dtype: auto is bfloat16 where the device computes in it",
            NOTHING: "remove it; for full precision write `model: {{dtype: float32}}`",
        },
    ),
    (
        "flash_attn",
        {
            **dict.fromkeys(("fa2", "true", "flash_attention_2"), FLASH),
            "fa3": "write `model: {{attention: flash_attention_3}}`",
            "sdpa": "write `model: {{attention: sdpa}}`",
            "auto": "remove it: the fastest that works is the default of model.attention",
            NOTHING: "write `model: {{attention: eager}}`",
        },
    ),
    ("train_on_inputs train_on_prompt train_on_input", {"true": LOSS_ON_ALL, NOTHING: DEFAULT_LOSS}),
    (
        "mask_prompt assistant_only_loss completion_only_loss train_on_responses_only",
        {"true": DEFAULT_LOSS, NOTHING: LOSS_ON_ALL},
    ),
    ("mask_history", {"true": "write `data: {{loss_on: last-turn}}`", NOTHING: DEFAULT_LOSS}),
    (
        "dataset_text_field",
        {
            NOTHING: "remove it: data.format: auto is the default",
            "text": "write `data: {{format: text}}`",
            OTHER: "write `data: {{format: text, columns: {{text: {value}}}}}`",
        },
    ),
    ("val_set_size val_size split_dataset_ratio validation_split", {NOTHING: NO_EVALUATION}),
    (
        "eval_strategy evaluation_strategy",
        {NOTHING: LAST_EVALUATION, "epoch": "write the steps of an epoch in training.eval_every"},
    ),
    ("evals_per_epoch eval_steps steps_per_eval", {NOTHING: LAST_EVALUATION}),
    ("save_strategy", {NOTHING: LAST_CHECKPOINT, "epoch": "write the steps of an epoch in training.save_every"}),
    ("saves_per_epoch save_steps save_every_n_steps", {NOTHING: LAST_CHECKPOINT}),
    ("use_gradient_checkpointing", {"unsloth": "write `training: {{gradient_checkpointing: true}}`"}),
    ("shuffle", {NOTHING: "remove it: rows are always shuffled, in an order that training.seed sets"}),
    ("do_train", {NOTHING: "remove it: `lora eval` evaluates without training"}),
    ("template", {"default": OWN_TEMPLATE, "auto": OWN_TEMPLATE, NOTHING: OWN_TEMPLATE}),
)
BY_VALUE: dict[str, dict[str, str]] = {
    **{key: fixes for keys, fixes in _GROUPS for key in keys.split()},
    **BY_VALUE_TRACKERS,
}


def _written(value: PlainValue) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shorten(str(value)) if not isinstance(value, list | dict) else ""


def asks_for_nothing(value: PlainValue) -> bool:
    """Return whether a value switches the thing off: false, null, 0, none, no, off, disabled, or an empty text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "null", "no", "off", "false", "disabled", "never")
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def fix_by_value(key: str, value: PlainValue) -> str | None:
    """Return the fix for a key of BY_VALUE with this value, None if it does not depend on it."""
    if isinstance(value, list | dict) or key not in BY_VALUE:
        return None
    fixes, text = BY_VALUE[key], _written(value)
    fix = fixes.get(text.lower()) or (fixes.get(NOTHING) if asks_for_nothing(value) else fixes.get(OTHER))
    return fix.format(value=text) if fix else None


def fix_of_renamed(key: str, value: PlainValue, *, kinds: set[str], choices: list[str], known: str | None) -> str:
    """Return the fix for a key that has another name here.

    Args:
        key: the key here, dotted.
        value: as written.
        kinds: JSON types that the key accepts.
        choices: texts that it accepts, if it does not accept all.
        known: the value here that means the same, if it has another name.
    """
    if value is None or (value is False and "boolean" not in kinds):
        return f"remove it: {_written(value)} asks for nothing"
    if known in choices and known != value:
        return f"write {_nested(key, str(known))}"
    if isinstance(value, str) and choices and value not in choices and not kinds & {"integer", "number", "string"}:
        return f"use {key}, which is {join_words(choices)}"
    if isinstance(value, str) and "array" in kinds and "," in value and key == "adapter.target_modules":
        names = ", ".join(part.strip() for part in value.split(","))
        return f"write {_nested(key, f'[{names}]')}"
    return f"use {key}"


def _nested(key: str, value: str) -> str:
    section, _, leaf = key.rpartition(".")
    return f"`{section}: {{{leaf}: {value}}}`" if section else f"`{leaf}: {value}`"


def fix_of_replaced(fix: str, value: PlainValue) -> str:
    """Return the fix for a key that has no counterpart: a value that asks for nothing needs none."""
    if asks_for_nothing(value) and not fix.startswith("remove it"):
        return f"remove it: {_written(value) or 'an empty value'} asks for nothing"
    return fix
