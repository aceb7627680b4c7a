"""Check the path of a model on this machine: a folder with config.json, a .gguf file, or else a hub id. No torch."""

import os
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from lora_cli.run.folder import is_path
from lora_cli.run.hub import HUB_ID_HINT, is_hub_id
from lora_cli.run.read_file import MAX_SHOWN, check_folder_readable, describe_kind, shorten_path

CONFIG_FILE = "config.json"  # of a model
# Of files that are no model, whatever they contain; another file can have the name of a hub id.
OTHER_FILES = (
    *(".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".py"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".zip", ".gz"),
)


def check_model_path(text: str, *, key: str = "model.path") -> None:
    """Check that there is a model at a path; what is no path on this machine has the form of a hub id.

    Args:
        text: the path or hub id.
        key: of the recipe, or the option, that has it; for messages.

    Raises:
        LoraError: there is nothing, or it is not a model.
    """
    if not text:
        raise LoraError(f"{key}: the path is empty", hint=_accepted(key))
    path = Path(os.path.expanduser(text))
    shown = shorten_path(path) if len(text) > MAX_SHOWN else text
    if path.suffix == ".gguf":
        if not os.path.lexists(path):
            raise LoraError(f"{key}: there is no file {shown}", hint=_suggest_path(path, key))
    elif os.path.isdir(path):
        _check_model_folder(path, text, key)
    elif os.path.lexists(path) and (not os.path.isfile(path) or path.suffix.lower() in OTHER_FILES):
        raise LoraError(f"{key}: {shown} is {describe_kind(path)}, not a folder", hint=_suggest_path(path, key))
    elif is_path(text):
        raise LoraError(f"{key}: there is no folder {shown}", hint=_suggest_path(path, key))
    elif not is_hub_id(text):
        raise LoraError(f"{key}: {shown} is not a folder, and cannot be a hub id", hint=HUB_ID_HINT)


def _check_model_folder(path: Path, text: str, key: str) -> None:
    check_folder_readable(path)
    is_adapter = os.path.lexists(path / ADAPTER_CONFIG_FILE)
    if not os.path.lexists(path / CONFIG_FILE):  # a link to nothing is named where the file is read
        hint = f"{key} accepts a folder that save_pretrained wrote, a .gguf file or a hub id"
        if is_adapter:
            hint = "this is an adapter: give the base model it was trained on"
        raise LoraError(f"{key}: {text} has no {CONFIG_FILE}", hint=hint)
    if is_adapter:  # transformers would load the adapter too, and merge and export would not
        raise LoraError(
            f"{key}: {text} is a model and an adapter: it has {CONFIG_FILE} and {ADAPTER_CONFIG_FILE}",
            hint="move the files of one of them to another folder",
        )


def _suggest_path(path: Path, key: str) -> str:
    if not os.path.isdir(path.parent):
        return f"there is no folder {shorten_path(path.parent)} either; {_accepted(key)}"
    names = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
    listed = ", ".join(names[:5]) or "nothing"
    return f"{path.parent} contains {listed}; {_accepted(key)}"


def _accepted(key: str) -> str:
    return f"{key} accepts a .gguf file, a folder or a hub id"
