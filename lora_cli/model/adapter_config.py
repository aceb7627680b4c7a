"""Read a saved adapter's configuration (adapter_config.json), and refuse every key that would be ignored silently.

PEFT drops keys that it does not know with a warning. An adapter that was trained with such a feature of another version
or tool would be loaded without it, and be another adapter.
"""

import dataclasses
import json
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_cli.errors import LoraError
from lora_cli.model.config_values import VALUE_HINT, check_patterns, check_values
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import printable, read_json_object

MAX_BYTES = 8 << 20  # AdaLoRA lists every component of every layer
# What PEFT's configurations raise for values that do not go together.
PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, ImportError)

# Keys that are unknown to PEFT, and have no effect on a trained adapter.
NO_EFFECT = (
    "unsloth_fixed",  # a mark of Unsloth
    "merge_weights",  # of old versions of PEFT: when the layers merge themselves
    "lorap_lr_ratio",  # learning rates of ms-swift
    "lorap_emb_lr",
    "runtime_config",  # of the process that saved it
)
# Methods that read other folders: by their type, the key that names these, and its value that names none.
READS_OTHER_FOLDERS = {"XLORA": ("adapters", None), "SHADOW": ("shadow_model", "mirror")}
# Initializations of PEFT that change the base weights: an adapter saved without conversion needs those weights.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Fields of LoraConfig that are honored when an adapter is loaded, merged and exported, or matter in training only.
LORA_FIELDS = frozenset(
    {field.name for field in dataclasses.fields(PeftConfig)}
    | {
        "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "bias",
        "fan_in_fan_out", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
        "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
        "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
        # Of initializations, whose result is in the adapter file, and of VeLoRA, which compresses activations.
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    }
)  # fmt: skip
# Fields of LoraConfig that are refused, with what they do.
REFUSED_LORA_FIELDS = {
    "alora_invocation_tokens": "it is active only after these tokens",
    "arrow_config": "it chooses among other adapters",
    "kasa_config": "it changes the base weights",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it needs Megatron's layers",
    "monteclora_config": "it samples its weights",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its input is pooled, for GPTQ bases",
}


def read_adapter_config(folder: Path) -> PeftConfig:
    """Read the PEFT configuration of the adapter in `folder`.

    Raises:
        LoraError: it cannot be read, or it has a key or value that cannot be honored.
    """
    file = folder / CONFIG_FILE
    if not os.path.lexists(file):
        raise LoraError(f"{folder} has no {CONFIG_FILE}", hint="give a run of lora train, or an adapter folder")
    stored = read_json_object(file, limit=MAX_BYTES)
    method = stored.get("peft_type")
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise LoraError(
            f"{file}: peft_type {printable(method)} is not a method of PEFT {version('peft')}",
            hint="upgrade PEFT (pip install -U peft) if the adapter is from a newer version",
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    check_values(file, stored, config_class)
    key, none = READS_OTHER_FOLDERS.get(method, ("", None))
    if stored.get(key, none) != none:
        raise LoraError(
            f"{file}: {key}: {_short(stored[key])} is not supported: PEFT would load what it names",
            hint="use the adapter with its base in PEFT, if you trust it",
        )
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    _check_known(file, {key: value for key, value in stored.items() if key not in fields}, stored.get("peft_version"))
    values = {key: value for key, value in stored.items() if key in fields and key not in NO_EFFECT}
    try:
        with warnings.catch_warnings():
            # Settings of the initialization that have no effect on trained weights.
            warnings.filterwarnings("ignore", r"`\w+_config` specified but will be ignored", UserWarning)
            config: PeftConfig = config_class(**config_class.check_kwargs(**values))
    except PEFT_ERRORS as reason:
        line = str(reason).strip().partition("\n")[0]
        raise LoraError(f"{file}: {line}", hint=VALUE_HINT) from reason
    check_patterns(file, config)
    _check_honored(file, config)
    return config


def _check_known(file: Path, unknown: dict[str, Any], written_by: object) -> None:
    """Raise if a key that PEFT does not know is set."""
    for key, value in sorted(unknown.items()):
        if _is_set(value) and key not in NO_EFFECT:
            by = f" (saved by PEFT {written_by})" if written_by else ""
            raise LoraError(
                f"{file}: {key}: {_short(value)} is unknown to PEFT {version('peft')}, which would ignore it{by}",
                hint="upgrade PEFT (pip install -U peft); if the key has no effect on the adapter, remove it",
            )


def _check_honored(file: Path, config: PeftConfig) -> None:
    """Raise if a field of a LoRA configuration is set that loading, merging and export do not honor."""
    if not isinstance(config, LoraConfig):
        return  # other methods are loaded and merged by PEFT's own code
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise LoraError(
            f"{file.parent}: PEFT changed the base weights before this adapter was trained (init_lora_weights: {init})",
            hint="save it as plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    own = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name, field in own.items():
        value = getattr(config, name)
        if name in LORA_FIELDS or value == field.default or not _is_set(value):
            continue
        why = REFUSED_LORA_FIELDS.get(name, f"PEFT {version('peft')} has this feature, but lora does not know it")
        raise LoraError(
            f"{file}: {name}: {_short(value)} is not supported: {why}", hint="use the adapter with its base in PEFT"
        )


def _is_set(value: object) -> bool:
    return value not in (None, False, "", [], {})


def _short(value: object) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
