"""Check the config.json and generation_config.json of a model before transformers builds anything from them.

transformers checks the types of most fields, but no sizes: a config with ten million layers takes hours and all memory,
and a few fields make it run other code or read other files.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.run.read_file import as_json, printable, read_json_object

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_LAYERS = 1000  # a config may have more only if the checkpoint has as many tensors
MAX_SIZE = 2**31  # of a dimension: of all sizes in use, vocabularies are the largest, some 10^5
LAYERS = re.compile(r"(^|_)((n|num)_([a-z_]+_)?(layers?|blocks?|stages?)|n_layers?|depth)$")
# Names of sizes. Each is at least 1, in the model's section and in those of its parts.
SIZES = re.compile(
    r"^(vocab_size|hidden_size|d_model|n_embd|dim|intermediate_size|d_ff|d_kv|ffn_dim|n_inner|head_dim|n_head|"
    r"(n|num)_([a-z_]+_)?(attention|key_value)_heads|max_position_embeddings|n_positions)$"
)
# Keys that are objects, or texts, if they are not null.
OBJECTS = ("quantization_config", "auto_map", "id2label", "label2id", "rope_scaling", "task_specific_params")
TEXTS = ("model_type", "transformers_version", "problem_type", "name_or_path", "_name_or_path", "tokenizer_class")
DTYPE_KEYS = ("dtype", "torch_dtype")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_config_file(file: Path, *, tensors: int | None, trusted: bool, hint: str) -> dict[str, Any]:
    """Read config.json and check what transformers does not.

    Args:
        file: config.json.
        tensors: number of tensors of the checkpoint; None if its files are not on this machine.
        trusted: whether code from the hub may run.
        hint: of the errors.

    Raises:
        LoraError: the file or one of its values cannot be used.
    """
    config = read_json_object(file, hint=hint)
    for path, key, value in _values(config):
        if problem := _problem(key, value, tensors):
            raise LoraError(f"{file}: {printable(path)} is {as_json(value)}: {problem}", hint=hint)
        if key in KERNEL_KEYS and isinstance(value, str) and "/" in value and not trusted:
            raise LoraError(
                f"{file}: {path} is {as_json(value)}: a kernel of the hub, whose code would run here",
                hint="remove it from the file; if you trust that code, name it in the recipe's model.attention",
            )
    weights = config.get("transformers_weights")
    if weights is not None:
        raise LoraError(
            f"{file}: transformers_weights is {as_json(weights)}: weights under another name are not supported",
            hint="rename them to model.safetensors, and remove the key",
        )
    return config


def check_heads(config: PretrainedConfig, file: Path, *, hint: str) -> None:
    """Check that the heads of attention divide, which some models find out in their first forward pass.

    Raises:
        LoraError: they do not.
    """
    text = config.get_text_config()
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared:
        raise LoraError(
            f"{file}: num_attention_heads is {heads:,}, which num_key_value_heads ({shared:,}) does not divide",
            hint=hint,
        )


def _values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of everything in a section of the config and, recursively, in its objects."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        yield path, key, value
        if isinstance(value, dict):
            yield from _values(value, f"{path}.")


def _problem(key: str, value: Any, tensors: int | None) -> str | None:
    """Return what is wrong with one value of the config; None if nothing is."""
    if key.startswith("__"):
        return "no name of a setting"
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            return "too large"
        if LAYERS.search(key) and not 0 <= value <= (limit := max(MAX_LAYERS, tensors or 0)):
            known = f", and the checkpoint has {tensors:,} tensors" if tensors else ""
            return f"at most {limit:,} can be right{known}" if value > 0 else "below 0"
        if SIZES.match(key) and not 1 <= value < MAX_SIZE:
            return "not a possible size"
    if value is None:
        return None
    if key in OBJECTS and not isinstance(value, dict):
        return "not an object"
    if key in TEXTS and not isinstance(value, str):
        return "not a text"
    if key in DTYPE_KEYS and not ((isinstance(value, str) and _is_dtype(value)) or isinstance(value, dict)):
        return "not a dtype of torch"
    if key == "architectures" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return "not a list of names"
    if key in TOKEN_ID_KEYS and not is_token_ids(value):
        return "not a token id"
    if key.endswith(("norm_eps", "norm_epsilon")) and not (_is_number(value) and 0 <= value < 1):
        return "not a number from 0 to 1"
    if key == "rope_theta" and not (_is_number(value) and 0 < value < math.inf):
        return "not a number above 0"
    return None


def _is_dtype(name: str) -> bool:
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_token_ids(value: Any) -> bool:
    """Return whether `value` is a token id or a list of them; -1 stands for none in some models."""
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(number, int) and not isinstance(number, bool) and -1 <= number < MAX_SIZE for number in ids)


def read_generation_config(folder: Path, *, hint: str) -> dict[str, Any]:
    """Return the generation_config.json of the model in `folder`; empty if there is none.

    transformers ignores a damaged one, and the model would stop at other tokens.

    Raises:
        LoraError: it is damaged, or a token id in it is none.
    """
    file = folder / GENERATION_CONFIG_FILE
    if not os.path.lexists(file):
        return {}
    config = read_json_object(file, hint=hint)
    for key in TOKEN_ID_KEYS:
        if config.get(key) is not None and not is_token_ids(config[key]):
            raise LoraError(f"{file}: {key} is {as_json(config[key])}: not a token id", hint=hint)
    return config
