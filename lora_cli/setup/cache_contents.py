"""What this tool keeps in its cache: each entry with its kind, size, last use and damage; removal of entries. No torch.

An entry is removed only while this process alone holds its locks: not one that a run reads, or that a command makes.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lora_cli.data.cache_versions import encoded_versions, gguf_versions
from lora_cli.report.chart_library import chart_versions
from lora_cli.run import atomic
from lora_cli.run.cache_entry import find_entry_damage
from lora_cli.run.cache_use import About, alone, last_used, read_about
from lora_cli.run.checksums import CHECKSUMS_FILE
from lora_cli.run.disk_space import written_bytes
from lora_cli.run.read_file import UnreadableError
from lora_cli.run.workspace import WORKSPACE, remove_leftovers

DAY_S = 86_400
UNFINISHED = ".unfinished-"  # rows of an encoding that was interrupted, and goes on where it stopped
EARLIER = "written by an earlier version"


class Kind(NamedTuple):
    """A folder of the cache."""

    name: str
    versions: Callable[[], Mapping[str, str]]  # that its entries need, to be used


KINDS = {
    "encoded": Kind("rows", encoded_versions),
    "gguf": Kind("unpacked GGUF", gguf_versions),
    "downloads": Kind("download", dict),
    "charts": Kind("chart library", chart_versions),
}


class Entry(NamedTuple):
    """An entry of the cache."""

    path: Path
    kind: str
    what: str  # dataset or model; empty if it does not say
    bytes: int
    used: float  # seconds since the epoch
    problem: str | None  # why it is not used any more: unfinished, damaged, of an earlier version
    unreadable: str | None = None  # why it cannot be told whether it has a problem; it is never removed


def list_entries(cache: Path, *, verify: bool = False) -> list[Entry]:
    """Return the entries of `cache`, those of a kind together, the one that was used last first.

    Args:
        cache: folder.
        verify: read every file; otherwise, damage shows only where an entry has no checksums.
    """
    found = [
        entry
        for folder, kind in KINDS.items()
        if (cache / folder).is_dir()
        for path in (cache / folder).iterdir()
        if (entry := _entry(path, kind, verify=verify)) is not None
    ]
    order = [kind.name for kind in KINDS.values()]
    return sorted(found, key=lambda entry: (order.index(entry.kind), -entry.used, entry.path.name))


def unknown_bytes(cache: Path) -> dict[str, int]:
    """Return the bytes of what is in `cache` and of no kind, by name; it is never removed."""
    return {
        path.name: written_bytes(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
        for path in cache.iterdir()
        if path.name not in KINDS
    }


def _entry(path: Path, kind: Kind, *, verify: bool) -> Entry | None:
    """Return the entry at `path`; None for a lock, and for what another process removes meanwhile."""
    if path.name.startswith(".lock-"):
        return None
    with suppress(FileNotFoundError):
        size = written_bytes(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
        used = last_used(path)
        try:
            what = (read_about(path) or About("", {})).what or _file_name(path)
            return Entry(path, kind.name, what, size, used, _problem(path, kind, verify))
        except UnreadableError as error:
            return Entry(path, kind.name, "", size, used, None, error.message)
    return None


def _file_name(path: Path) -> str:
    """Return the name of a download of an earlier version, which is that of its file."""
    if path.parent.name != "downloads" or not path.is_dir():
        return ""
    return next((each.name for each in path.iterdir() if each.name != CHECKSUMS_FILE), "")


def _problem(path: Path, kind: Kind, verify: bool) -> str | None:
    if WORKSPACE.fullmatch(path.name):
        return "unfinished: a process was killed, or is writing it"
    if path.name.startswith(UNFINISHED):
        return "unfinished: the encoding goes on when it is started again"
    # With an ending that each name has, only the record and the list of files are compared.
    damage = find_entry_damage(path, unread=None if verify else "")
    if damage is not None:
        return f"damaged: {damage}"
    about = read_about(path)
    if about is None:  # rows of earlier versions are of another format; other entries do not change
        return EARLIER if kind is KINDS["encoded"] else None
    return EARLIER if about.versions != dict(kind.versions()) else None


class Pruned(NamedTuple):
    """What `prune` did with an entry."""

    entry: Entry
    reason: str
    removed: bool  # False: a process uses it, or it cannot be read


def prune(entries: list[Entry], *, older_than_days: float) -> Iterator[Pruned]:
    """Remove the entries that have a problem, or were not used for some days, unless a process uses them.

    Raises:
        OSError: an entry cannot be removed.
    """
    now = time.time()
    for entry in entries:
        days = (now - entry.used) / DAY_S
        reason = entry.problem or (f"not used for {days:.0f} days" if days >= older_than_days else None)
        if entry.unreadable is not None:
            yield Pruned(entry, entry.unreadable, removed=False)
        elif reason is not None:
            yield Pruned(entry, reason, _remove(entry.path))


def _remove(path: Path) -> bool:
    if WORKSPACE.fullmatch(path.name):
        remove_leftovers(path.parent, WORKSPACE.fullmatch(path.name)["name"])  # type: ignore[index]
        return not os.path.lexists(path)
    entry = path.with_name(path.name.removeprefix(UNFINISHED))
    with alone(entry) as nobody_else:
        if nobody_else and os.path.lexists(path):
            atomic.remove(path)
        return nobody_else
