"""Check the path of a model on this machine: a folder with config.json, a .gguf file, or else a hub id. No torch."""

import os
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from lora_cli.run.folder import is_path
from lora_cli.run.read_file import check_folder_readable, describe_kind

CONFIG_FILE = "config.json"  # of a model
# Of files that are no model, whatever they contain; another file can have the name of a hub id.
OTHER_FILES = (
    *(".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".py"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".zip", ".gz"),
)


def check_model_path(text: str, *, key: str = "model.path") -> None:
    """Check that there is a model at a path; what is no path on this machine can be a hub id, and is not checked.

    Args:
        text: the path or hub id.
        key: of the recipe, or the option, that has it; for messages.

    Raises:
        LoraError: there is nothing, or it is not a model.
    """
    path = Path(os.path.expanduser(text))
    if path.suffix == ".gguf":
        if not os.path.lexists(path):
            raise LoraError(f"{key}: there is no file {text}", hint=_suggest_path(path, key))
    elif path.is_dir():
        _check_model_folder(path, text, key)
    elif os.path.lexists(path) and (not path.is_file() or path.suffix.lower() in OTHER_FILES):
        raise LoraError(f"{key}: {text} is {describe_kind(path)}, not a folder", hint=_suggest_path(path, key))
    elif is_path(text):
        raise LoraError(f"{key}: there is no folder {text}", hint=_suggest_path(path, key))


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
    accepted = f"{key} accepts a .gguf file, a folder or a hub id"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; {accepted}"
    names = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
    listed = ", ".join(names[:5]) or "nothing"
    return f"{path.parent} contains {listed}; {accepted}"
