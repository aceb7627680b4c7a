"""`lora cache`: show what this tool keeps in its cache, and remove what is damaged or unused. No torch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.table import Table

from lora_cli.run import console
from lora_cli.run.cache_folder import CACHE_VARIABLE, cache_folder
from lora_cli.run.console import format_bytes
from lora_cli.setup.cache_contents import DAY_S, Entry, Pruned, list_entries, prune, unknown_bytes

OLDER_THAN_DAYS = 30.0
SLOW_BYTES = 2 << 30  # to read: it takes seconds


class HubCache(NamedTuple):
    """The cache of the Hugging Face hub, which other programs use too."""

    folder: Path
    repositories: int
    bytes: int


def show_cache() -> dict[str, Any]:
    """Print and return the entries of the cache with their kind, size and last use, and the size of the hub's cache."""
    folder = cache_folder()
    entries, others, hub = list_entries(folder), unknown_bytes(folder), _hub_cache()
    if entries:
        _print_entries(entries)
    for name, count in others.items():
        console.out.print(f"{name}: {format_bytes(count)}, not known to this command: it is left alone")
    _print_totals(folder, entries, hub)
    if stale := [entry for entry in entries if entry.problem is not None]:
        freed = format_bytes(sum(entry.bytes for entry in stale))
        console.info(f"lora cache --prune removes {len(stale)} that are no longer used ({freed}), and reads the others")
    return {**_summary(folder, entries, others, hub), "entries": [_as_json(entry) for entry in entries]}


def prune_cache(*, older_than_days: float) -> dict[str, Any]:
    """Remove damaged and unfinished entries, those of earlier versions, and those that were not used for some days.

    Prints and returns what was removed, and what is left.

    Raises:
        LoraError: the cache folder cannot be used.
    """
    folder = cache_folder()
    size = sum(entry.bytes for entry in list_entries(folder))
    if size > SLOW_BYTES:
        console.info(f"verifying {folder}: {format_bytes(size)}")
    results = list(prune(list_entries(folder, verify=True), older_than_days=older_than_days))
    left, others, hub = list_entries(folder), unknown_bytes(folder), _hub_cache()
    removed = [each for each in results if each.removed]
    for each in results:
        kept = "it cannot be read now" if each.entry.unreadable else "a process uses it"
        verb = "removed" if each.removed else f"kept, because {kept}"
        size_text = format_bytes(each.entry.bytes)
        console.out.print(f"{verb}: {each.entry.kind} {_describe(each.entry)}, {size_text} ({each.reason})")
    freed = format_bytes(sum(each.entry.bytes for each in removed))
    console.out.print(
        f"removed {len(removed)} of {len(removed) + len(left)} entries, {freed}: damaged, unfinished, of an earlier "
        f"version, or not used for {older_than_days:g} days"
    )
    _print_totals(folder, left, hub)
    return {
        **_summary(folder, left, others, hub),
        "removed": [_removal_as_json(each) for each in removed],
        "in_use": [_removal_as_json(each) for each in results if not (each.removed or each.entry.unreadable)],
        "unreadable": [_removal_as_json(each) for each in results if each.entry.unreadable],
        "removed_bytes": sum(each.entry.bytes for each in removed),
        "entries": [_as_json(entry) for entry in left],
    }


def _print_entries(entries: Sequence[Entry]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("kind", "of", "size", "last used", "entry", ""):
        table.add_column(name, justify="right" if name == "size" else "left")
    for entry in entries:
        place = f"{entry.path.parent.name}/{entry.path.name}"
        table.add_row(
            entry.kind,
            _describe(entry),
            format_bytes(entry.bytes),
            _age(entry.used),
            place,
            entry.problem or entry.unreadable or "",
        )
    console.print_table(table)


def _describe(entry: Entry) -> str:
    """Return the dataset or model of an entry: `train.jsonl for org/model`."""
    return (
        entry.what.removeprefix("the ").removeprefix("rows of ").removeprefix("unpacked ").removeprefix("download of ")
        or "(not recorded)"
    )


def _age(used: float) -> str:
    days = int((time.time() - used) // DAY_S)
    return "today" if days < 1 else f"{days} day{'s' * (days > 1)} ago"


def _print_totals(folder: Path, entries: Sequence[Entry], hub: HubCache) -> None:
    total = format_bytes(sum(entry.bytes for entry in entries))
    count = "one entry" if len(entries) == 1 else f"{len(entries)} entries"
    console.out.print(f"{folder}: {count}, {total} ({CACHE_VARIABLE} names another folder)")
    console.out.print(
        f"{hub.folder}: {hub.repositories} models and datasets of the hub, {format_bytes(hub.bytes)}; "
        "shared with other programs: hf cache ls shows them, hf cache rm removes"
    )


def _hub_cache() -> HubCache:
    folder = Path(constants.HF_HUB_CACHE)
    try:
        found = scan_cache_dir(folder)
    except CacheNotFound:
        return HubCache(folder, 0, 0)
    return HubCache(folder, len(found.repos), found.size_on_disk)


def _summary(folder: Path, entries: Sequence[Entry], others: dict[str, int], hub: HubCache) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "bytes": sum(entry.bytes for entry in entries),
        "other_bytes": others,
        "hub": {"folder": str(hub.folder), "repositories": hub.repositories, "bytes": hub.bytes},
    }


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "of": entry.what or None,
        "path": str(entry.path),
        "bytes": entry.bytes,
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used)),
        "problem": entry.problem or entry.unreadable,
    }


def _removal_as_json(each: Pruned) -> dict[str, Any]:
    return {**_as_json(each.entry), "reason": each.reason}
