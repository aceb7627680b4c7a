"""The folders of a run's checkpoints: listed, verified, set aside when damaged, and pruned. No tensors."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, read_checksums
from lora_cli.run.read_file import read_json_object
from lora_cli.run.workspace import sync

KIND = "checkpoint"  # in checksums.json
STATE_FILE = "state.json"
NAME = re.compile(r"step-(\d{8,})")
DAMAGED = "damaged-{}-{}"  # name of a damaged checkpoint, and a number

Info = Callable[[str], None]


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first; links and folders of other names are none."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_step)


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, in order; empty if the system refuses to list it."""
    try:
        return [_step(path) for path in list_checkpoints(folder)]
    except OSError:
        return []


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


class SavedState(NamedTuple):
    """The newest checkpoint of a run, and the values in its state.json."""

    folder: Path
    values: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return int(self.values["step"])


def newest_checkpoint(folder: Path) -> SavedState | None:
    """Return the newest checkpoint in `folder`, which `set_aside_damaged` has verified; None if it has none.

    Raises:
        LoraError: its state.json cannot be read.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    return SavedState(checkpoints[-1], read_json_object(checkpoints[-1] / STATE_FILE))


def checkpoint_damage(checkpoint: Path) -> str | None:
    """Return what is damaged in a checkpoint, in one line; None if each of its files is as it was written."""
    try:
        record = read_checksums(checkpoint)
        if record is None or record.kind != KIND or STATE_FILE not in record.files:
            return f"it has no {CHECKSUMS_FILE} of a checkpoint"
        if damage := find_damage(checkpoint):
            return damage[0] + (f", and {len(damage) - 1} more" if len(damage) > 1 else "")
        step = read_json_object(checkpoint / STATE_FILE).get("step")
    except LoraError as error:
        return error.message
    return None if step == _step(checkpoint) else f"it is of step {step}"


def set_aside_damaged(folder: Path, *, info: Info) -> Path | None:
    """Find the newest checkpoint of `folder` that is undamaged; rename damaged ones that are newer, and name them.

    Returns:
        The checkpoint; None if there is none.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        if (damage := checkpoint_damage(checkpoint)) is None:
            return checkpoint
        set_aside(checkpoint, damage, info=info)
    return None


def set_aside(checkpoint: Path, damage: str, *, info: Info) -> None:
    """Rename a damaged checkpoint, so that it is no checkpoint any more, and report it."""
    number = 1
    while os.path.lexists(aside := checkpoint.with_name(DAMAGED.format(checkpoint.name, number))):
        number += 1
    checkpoint.rename(aside)
    sync(checkpoint.parent)
    info(f"{checkpoint} is damaged: {damage}; set aside as {aside.name}")


def prune_checkpoints(folder: Path, keep: int, *, info: Info, best: int | None = None) -> None:
    """Delete all checkpoints in `folder` except the `keep` newest undamaged ones, and that of step `best`.

    Damaged checkpoints do not count: they are set aside, and reported.
    """
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) <= keep:
        return
    kept = 1  # the newest was written right before
    for checkpoint in reversed(checkpoints[:-1]):
        if kept < keep:
            damage = checkpoint_damage(checkpoint)
            if damage is None:
                kept += 1
            else:
                set_aside(checkpoint, damage, info=info)
        elif best is None or checkpoint != checkpoint_folder(folder, best):
            atomic.remove(checkpoint)
