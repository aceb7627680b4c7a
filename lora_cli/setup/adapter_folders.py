"""Find the adapters that a command line names: a run, a checkpoint or an adapter folder, `DIR` or `NAME=DIR`."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.evaluation.report import BASE
from lora_cli.model.adapter_files import AdapterFiles
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.saved_adapter import check_same_base
from lora_cli.run.folder import CONFIG_FILE, LOCK, find_adapter_folder, user_of_run
from lora_cli.training.checkpoint_folders import list_checkpoints

HINT = "give a run of lora train, or an adapter folder"


def find_adapter(target: Path, *, hint: str = HINT) -> Path:
    """Return the adapter folder that `target` is, or that the run in `target` has; `hint` says what would fit.

    Raises:
        LoraError: `target` is neither, or a run that has no adapter yet.
    """
    if (folder := find_adapter_folder(target)) is not None:
        return folder
    check_not_unfinished(target)
    if not os.path.exists(target):  # False for a name that is too long, where Path.exists raises
        raise LoraError(f"{target} does not exist", hint=hint)
    if (target / "adapter").is_dir():
        target /= "adapter"
    if is_model_folder(target):
        raise LoraError(f"{target} is a model, not an adapter", hint=hint)
    raise LoraError(f"{target} has no {CONFIG_FILE}", hint=hint)


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
    resume = f"lora train {target / 'recipe.yaml'} --resume"
    raise LoraError(
        f"{target} has no adapter: its training did not finish",
        hint=f"continue it with {resume}, or {newest}" if newest else f"train it again: {resume[:-9]} --fresh",
    )


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


@contextmanager
def check_bases(adapters: Iterable[AdapterFiles], base: BaseCheckpoint, *, allowed: bool) -> Iterator[None]:
    """Context manager around the loading of `base`: compare its weights with those that the adapters were trained on.

    A local model is compared before the block; a hub model after it, because only then are its files in the cache.

    Raises:
        LoraError: the weights differ, and `allowed` is False.
    """
    local = base.source.gguf_file is not None or Path(base.source.path).is_dir()
    for adapter in adapters if local else ():
        check_same_base(adapter, base, allowed=allowed)
    yield
    for adapter in () if local else adapters:
        check_same_base(adapter, base, allowed=allowed)


def _split(item: str) -> tuple[str | None, str]:
    """Split at the first equals sign behind which an existing path begins, if the whole is not a path."""
    if "=" not in item or Path(os.path.expanduser(item)).exists():
        return None, item
    signs = [position for position, character in enumerate(item) if character == "="]
    splits = [(item[:position].strip(), item[position + 1 :]) for position in signs]
    return next((split for split in splits if split[1] and Path(os.path.expanduser(split[1])).exists()), splits[0])
