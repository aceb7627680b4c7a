"""Find the adapters that a command line names: a run, a checkpoint or an adapter folder, `DIR` or `NAME=DIR`. No torch.

The command line calls these functions before it imports a command, which takes seconds: a mistake is told at once.
"""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.detect import TOOLS, conversion_hint, find_foreign
from lora_cli.run.folder import BASE, CONFIG_FILE, find_adapter_folder
from lora_cli.run.read_file import check_folder_readable, describe_kind
from lora_cli.run.run_lock import LOCK, user_of_run
from lora_cli.run.shell import shell_path
from lora_cli.training.checkpoint_folders import list_checkpoints

HINT = "give a run of lora train, or an adapter folder"


def find_adapter(target: Path, *, hint: str = HINT) -> Path:
    """Return the adapter folder that `target` is, or that the run in `target` has; `hint` says what would fit.

    Raises:
        LoraError: `target` is neither, or a run that has no adapter yet.
    """
    folder = find_adapter_folder(target)
    check_not_foreign(folder or target)
    if folder is not None:
        return folder
    check_not_unfinished(target)
    if not os.path.exists(target):  # False for a name that is too long, where Path.exists raises
        raise LoraError(f"{target} does not exist", hint=hint)
    if not os.path.isdir(target):
        raise LoraError(f"{target} is {describe_kind(target)}, not an adapter", hint=hint)
    check_folder_readable(target)
    if (target / "adapter").is_dir():
        target /= "adapter"
        check_folder_readable(target)
    if is_model_folder(target):
        raise LoraError(f"{target} is a model, not an adapter", hint=hint)
    raise LoraError(f"{target} has no {CONFIG_FILE}", hint=hint)


def check_not_foreign(path: Path) -> None:
    """Raise if `path` is an adapter that PEFT cannot load, and `lora adapter convert` can.

    Raises:
        LoraError: it is one of mlx-lm, LitGPT, torchtune, or with pickled weights.
    """
    if (found := find_foreign(path)) is not None:
        tool = TOOLS[found.tool].name
        raise LoraError(f"{path} is an adapter of {tool}: {found.weights.name}", hint=conversion_hint(path))


def check_not_unfinished(target: Path) -> None:
    """Raise if `target` is the folder of a run that has no adapter.

    Raises:
        LoraError: the run is in training, or ended before its adapter was written.
    """
    if not os.path.isfile(target / LOCK) or os.path.lexists(target / "adapter"):
        return
    checkpoints = list_checkpoints(target / "checkpoints")
    newest = f"use its newest checkpoint, {checkpoints[-1]}" if checkpoints else ""
    if (process := user_of_run(target)) is not None:
        raise LoraError(
            f"{target} has no adapter yet: process {process} is training it",
            hint="wait for it" + (f", or {newest}" if newest else ""),
        )
    resume = f"lora train {shell_path(target / 'recipe.yaml')} --resume"
    raise LoraError(
        f"{target} has no adapter: its training did not finish",
        hint=f"continue it with {resume}, or {newest}" if newest else f"train it again: {resume[:-9]} --fresh",
    )


def find_chat_adapters(target: Path, adapters: Sequence[str]) -> dict[str, Path]:
    """Return the adapter folders of `lora chat` by the names that /use accepts; empty for a model.

    Args:
        target: a run, adapter or model folder, or a .gguf file.
        adapters: further adapters of the same base, `DIR` or `NAME=DIR`.

    Raises:
        LoraError: one of them is none of these.
    """
    folders: dict[str, Path] = {}
    if target.suffix != ".gguf" and not is_model_folder(target):
        folders["adapter"] = find_adapter(target, hint="give a run of lora train, an adapter folder or a model")
    elif adapters:
        raise LoraError("--adapter needs an adapter or a run as target", hint="write one of the adapters as the target")
    for item in adapters:
        name, folder = parse_named_folder(item, taken=folders)
        folders[name] = folder
    return folders


def check_measurable(target: Path) -> None:
    """Raise if `lora eval` cannot measure `target`.

    Raises:
        LoraError: it is no file, and no folder of an adapter or a run; or an adapter of another tool.
    """
    check_not_foreign(find_adapter_folder(target) or target)
    if not (target.is_file() or os.path.lexists(target / CONFIG_FILE) or (target / "recipe.yaml").is_file()):
        raise LoraError(
            f"{target} is not a recipe, run or adapter folder", hint="give a YAML file, or a folder of lora train"
        )


def parse_weighted_adapters(items: Sequence[str]) -> tuple[list[Path], list[float]]:
    """Return the adapter folders and weights of `lora adapter combine`, `DIR` or `WEIGHT*DIR` each.

    Raises:
        LoraError: a folder has no adapter, a weight is not a number, or there are fewer than two.
    """
    folders, weights = [], []
    for item in items:
        weight, star, path = item.rpartition("*")
        weights.append(_parse_weight(weight, item) if star else 1.0)
        folders.append(find_adapter(Path(path)))
    if len(folders) < 2:
        raise LoraError("combine: there is only one adapter", hint="name two or more")
    return folders, weights


def _parse_weight(text: str, item: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise LoraError(f"{item}: {text} is not a weight", hint="write 0.5*runs/a/adapter")
    return weight


class NamedFolder(NamedTuple):
    """A folder and the name that the user sees."""

    name: str
    folder: Path


def parse_named_folder(item: str, *, taken: Collection[str], accepts_models: bool = False) -> NamedFolder:
    """Return the folder and the name of `DIR` or `NAME=DIR`; of a run, the folder of its adapter.

    Args:
        item: a value of --adapter. An existing path is a path, even if it contains an equals sign.
        taken: names in use.
        accepts_models: whether the folder of a merged model is allowed.

    Raises:
        LoraError: the folder is not an adapter, or the name is empty or taken.
    """
    name, path = _split(item)
    folder = Path(os.path.expanduser(path))
    if not (accepts_models and is_model_folder(folder)):
        try:
            folder = find_adapter(folder)
        except LoraError as error:
            raise LoraError(f"--adapter {item}: {error.message}", hint=error.hint) from None
    if name is None:
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name == "adapter" else resolved.name
    if not name or not name.isprintable():
        raise LoraError(f"--adapter {item}: the name is empty or not printable", hint="write --adapter NAME=DIR")
    if name in (BASE, *taken):
        raise LoraError(f"--adapter {item}: the name {name} is taken", hint="give another: --adapter NAME=DIR")
    return NamedFolder(name, folder)


def is_model_folder(folder: Path) -> bool:
    """Return whether `folder` has the configuration of a model, and none of an adapter."""
    return os.path.isfile(folder / "config.json") and not os.path.lexists(folder / CONFIG_FILE)


def _split(item: str) -> tuple[str | None, str]:
    """Split at the first equals sign behind which an existing path begins, if the whole is not a path."""
    if "=" not in item or Path(os.path.expanduser(item)).exists():
        return None, item
    signs = [position for position, character in enumerate(item) if character == "="]
    splits = [(item[:position].strip(), item[position + 1 :]) for position in signs]
    return next((split for split in splits if split[1] and Path(os.path.expanduser(split[1])).exists()), splits[0])
