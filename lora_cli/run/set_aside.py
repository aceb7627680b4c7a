"""Set a damaged file aside: rename it to a name that no program reads, so that nothing is lost. No torch."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.read_file import UnreadableError
from lora_cli.run.workspace import sync


def set_aside(path: Path) -> Path:
    """Rename `path`, a file or whatever is in its place, to `metrics.damaged-1.jsonl`, for example; return the name.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")):
        number += 1
    path.rename(aside)
    sync(path.parent)
    return aside


def original_name(name: str) -> str | None:
    """Return the name that a file had before `set_aside` gave it `name`; None if it did not."""
    found = re.fullmatch(r"(.+)\.damaged-\d+(\.\w+)?", name)
    return f"{found[1]}{found[2] or ''}" if found else None


def set_aside_damaged(path: Path, read: Callable[[Path], object], *, info: Callable[[str], None]) -> None:
    """Set `path` aside and report it, if it exists and `read` raises a LoraError: it will be written anew.

    Raises:
        UnreadableError: the system refuses to open it; it may be whole.
        OSError: it cannot be renamed.
    """
    if not os.path.lexists(path):
        return
    try:
        read(path)
    except UnreadableError:
        raise
    except LoraError as error:
        problem = error.message.removeprefix(f"{path} ")
        info(f"{path} is damaged: {problem}; set aside as {set_aside(path).name}, and written anew")
