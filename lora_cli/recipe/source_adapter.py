"""Read the adapter that `adapter.from` names: its configuration as keys of the adapter section. JSON only, no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.run.folder import CONFIG_FILE, find_adapter_folder
from lora_cli.run.read_file import read_json_object

LIST_KEYS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
TASK_HEADS = {"classifier", "score"}  # PEFT adds both to modules_to_save of classifiers, whatever their head is called
# PEFT's type: keys of its configuration by keys of the recipe. All types over layers have COMMON too.
COMMON = {
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "modules_to_save": "modules_to_save",
}
LAYERS = {"layers": "layers_to_transform"}
KEYS: dict[str, dict[str, str]] = {
    "LORA": {
        **COMMON,
        **LAYERS,
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "bias": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    },
    "LOHA": {**COMMON, **LAYERS, "rank": "r", "alpha": "alpha", "dropout": "rank_dropout"},
    "LOKR": {**COMMON, **LAYERS, "rank": "r", "alpha": "alpha", "dropout": "rank_dropout"},
    "VERA": {**COMMON, **LAYERS, "rank": "r", "dropout": "vera_dropout", "bias": "bias"},
    "IA3": {**COMMON, "feedforward_modules": "feedforward_modules"},
    "OFT": {**COMMON, **LAYERS, "rotation_size": "oft_block_size", "bias": "bias"},
    "BOFT": {
        **COMMON,
        **LAYERS,
        "rotation_size": "boft_block_size",
        "butterflies": "boft_n_butterfly_factor",
        "dropout": "boft_dropout",
        "bias": "bias",
    },
    "PREFIX_TUNING": {"virtual_tokens": "num_virtual_tokens"},
    "PROMPT_TUNING": {"virtual_tokens": "num_virtual_tokens"},
}
METHODS = {
    "LOHA": "loha",
    "LOKR": "lokr",
    "VERA": "vera",
    "IA3": "ia3",
    "OFT": "oft",
    "BOFT": "boft",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
}
COUNTS = ("rank", "rotation_size", "butterflies", "virtual_tokens")
MAY_DIFFER = {"dropout"}  # no part of the trained function


def source_keys(path: str) -> dict[str, Any]:
    """Return the keys of the adapter section that describe the adapter in `path`; empty if it cannot be read.

    `model/adapter_files.py` reports what is wrong with it, when training needs it.
    """
    folder = find_adapter_folder(Path(path))
    if folder is None:
        return {}
    try:
        keys = keys_of_config(read_json_object(folder / CONFIG_FILE))
    except (LoraError, TypeError, ValueError, AttributeError, OverflowError):  # values of wrong types
        return {}
    return keys if all(_is_possible(key, value) for key, value in keys.items()) else {}


def _is_possible(key: str, value: Any) -> bool:
    """Return whether the recipe's key could have the value: else the recipe would be blamed for the adapter's."""
    if value is None:
        return True
    if key in COUNTS:
        return type(value) is int and value >= 1
    if key in ("alpha", "dropout"):
        return type(value) in (int, float) and (0 < value < math.inf if key == "alpha" else 0 <= value < 1)
    if key == "bias":
        return value in ("none", "all", "lora_only")
    if key.endswith("_pattern"):
        return isinstance(value, dict) and all(_is_possible(key.partition("_")[0], each) for each in value.values())
    if key == "layers":
        return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    if key in LIST_KEYS and not isinstance(value, str):
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return isinstance(value, str)


def keys_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the adapter section for a PEFT configuration; empty if its type cannot be continued."""
    peft_type = str(config.get("peft_type"))
    if peft_type not in KEYS:
        return {}
    keys = {key: _recipe_value(key, config.get(name)) for key, name in KEYS[peft_type].items()}
    if parameters := config.get("target_parameters"):
        modules = keys["target_modules"]
        keys["target_modules"] = [*(modules if isinstance(modules, list) else []), *sorted(parameters)]
    if keys.get("modules_to_save") and str(config.get("task_type")) in ("SEQ_CLS", "TOKEN_CLS"):
        keys["modules_to_save"] = [name for name in keys["modules_to_save"] if name not in TASK_HEADS] or None
    return {"method": _method(peft_type, config), **keys}


def _method(peft_type: str, config: Mapping[str, Any]) -> str:
    if peft_type == "LORA":
        return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    return METHODS[peft_type]


def _recipe_value(key: str, value: Any) -> Any:
    if value is None or value in ([], {}, set()):
        return None
    if key in LIST_KEYS and isinstance(value, (list, set)):
        return sorted(value)  # PEFT writes a set, in an order of its own
    if key == "layers":
        return [value] if isinstance(value, int) else value
    if key == "alpha":
        return float(value)
    if key == "alpha_pattern":
        return {name: float(alpha) for name, alpha in value.items()}
    if key == "bias":
        return "lora_only" if str(value).endswith("_only") else value
    return value


def is_same_method(method: str, source: str) -> bool:
    """Return whether an adapter saved as method `source` can be trained on as `method`."""
    return method == source or (method == "lora+" and source == "lora")


def disagreements(section: Mapping[str, Any], source: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value of the recipe, value of the adapter) for each key that differs.

    Args:
        section: the adapter section of a recipe, by key.
        source: `keys_of_config` of the saved adapter.
    """
    if not is_same_method(section["method"], source["method"]):
        return [("method", section["method"], source["method"])]
    keys = [key for key in source if key != "method" and key not in MAY_DIFFER]
    return [(key, section[key], source[key]) for key in keys if _comparable(section[key]) != _comparable(source[key])]


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
