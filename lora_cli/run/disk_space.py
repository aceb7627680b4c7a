"""Disk space: whether what a command is about to write fits, checked before the work and before each save. No torch."""

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run.console import format_bytes

HINT = "free some space, or choose a folder on another disk"


class Need(NamedTuple):
    """Bytes that will be written to one folder."""

    folder: Path  # or a file in it; it may not exist yet
    bytes: int
    what: str  # for messages: `the merged model`, `2 checkpoints`


def check_free_space(needs: Sequence[Need], *, hint: str = HINT) -> None:
    """Check that all needs fit on their disks; needs on the same disk are added up.

    Args:
        needs: what will be written.
        hint: what the user can do.

    Raises:
        LoraError: a disk has too little free space (exit code 1). The message names the bytes needed and free.
    """
    by_disk: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        if need.bytes > 0 and (place := _existing(need.folder)) is not None:
            by_disk[place.stat().st_dev].append(need)
    for on_disk in by_disk.values():
        total = sum(need.bytes for need in on_disk)
        free = free_bytes(on_disk[0].folder)
        if free is not None and free < total:
            raise LoraError(
                f"{on_disk[0].folder}: {format_bytes(total)} ({total:,} bytes) are needed for {_describe(on_disk)}, "
                f"and {format_bytes(free)} ({free:,} bytes) are free",
                hint=hint,
                exit_code=1,
            )


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that this user may still write on the disk of `folder`; None where the disk does not say.

    `folder` may be missing: then it is the disk of the nearest folder above it. Quotas of a user are not included.
    """
    place = _existing(folder)
    usage = None if place is None else shutil.disk_usage(place)
    return usage.free if usage and usage.total else None  # some network file systems report no size


def written_bytes(folder: Path, *, without: str | None = None) -> int:
    """Return the bytes of all files in `folder` and below it, such as a checkpoint's; 0 if it does not exist.

    Args:
        folder: the folder.
        without: name of files that do not count.
    """
    files = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if name != without)
    return sum(os.lstat(file).st_size for file in files)


def _describe(needs: Sequence[Need]) -> str:
    if len(needs) == 1:
        return needs[0].what
    parts = [f"{need.what} ({format_bytes(need.bytes)})" for need in needs]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _existing(path: Path) -> Path | None:
    """Return the nearest existing folder at or above `path`."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), None)
