"""Entries of the cache: folders named by a key, verified before they are used, and made again if damaged. No torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.cache_use import mark_used, write_about
from lora_cli.run.checksums import CHECKSUMS_FILE, compare, list_files, read_checksums, verified_folder
from lora_cli.run.read_file import UnreadableError
from lora_cli.run.system_errors import WRITING, describe
from lora_cli.run.workspace import remove_leftovers

KIND = "cache entry"  # in checksums.json
OTHER_CACHE = "set LORA_CACHE to a folder that can be written, or correct this one"
OTHER_DISK = "free some space, or set LORA_CACHE to a folder on another disk"

Info = Callable[[str], None]


def cached_entry(
    folder: Path,
    *,
    make: Callable[[Path], None],
    what: str,
    versions: Mapping[str, str],
    info: Info,
    reuse: bool = True,
    unread: str | None = None,
) -> Path:
    """Return the cache entry `folder`, after making it if it is missing or damaged.

    Safe with concurrent processes: one makes the entry, the others wait. A kill leaves no part of an entry.

    Args:
        folder: of the entry; its name is a hash of what it is made from.
        make: writes the entry's files into a folder.
        what: the entry, for messages and `lora cache`: `the rows of train.jsonl`.
        versions: of the libraries that make it, for `lora cache`.
        info: prints that the entry is damaged, or that another process makes it.
        reuse: whether an intact entry is used; if not, it is made again.
        unread: ending of file names that the caller will not read, so that they are not verified.

    Raises:
        LoraError: the cache cannot be written; and what `make` raises.
    """
    if reuse and entry_damage(folder, unread=unread) is None and folder.is_dir() and mark_used(folder):
        remove_leftovers(folder.parent, folder.name)  # of a process that was killed after the entry was complete
        return folder
    with lock_entry(folder, what=what, info=info):
        if not (reuse and is_intact(folder, what=what, info=info, unread=unread)):
            with verified_folder(folder, kind=KIND, published=False, replace=True, key=folder.name) as partial:
                make(partial)
                write_about(partial, what, versions)
        mark_used(folder)
    return folder


@contextmanager
def lock_entry(folder: Path, *, what: str, info: Info) -> Iterator[None]:
    """Hold the lock of the cache entry `folder`, and remove what a killed process left of it.

    Raises:
        LoraError: the cache cannot be written, or its lock is no file.
    """
    lock = folder.with_name(f".lock-{folder.name}")
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic.lock(lock, lambda: info(f"waiting for another process that makes {what}")))
        except OSError as error:
            place = error.filename or lock
            raise LoraError(f"the cache cannot be used: {place}: {error.strerror}", hint=OTHER_CACHE) from None
        # Leftovers of this key only: other machines may be writing other keys.
        remove_leftovers(folder.parent, folder.name)
        try:
            yield
        except OSError as error:
            if error.errno not in WRITING:
                raise
            raise LoraError(f"the cache cannot be written: {describe(error)}", hint=OTHER_DISK, exit_code=1) from error


def is_intact(folder: Path, *, what: str, info: Info, unread: str | None = None) -> bool:
    """Return whether the cache entry `folder` exists and is as it was written; report a damaged one."""
    damage = entry_damage(folder, unread=unread)
    if damage is not None:
        info(f"cache: {folder} is damaged: {damage}; making {what} again")
    return damage is None and os.path.lexists(folder)


def entry_damage(folder: Path, *, unread: str | None = None) -> str | None:
    """Return what is damaged in the cache entry `folder`, in one line; None if nothing, or if there is no entry.

    What cannot be read now counts as damaged: it cannot be used.
    """
    try:
        return find_entry_damage(folder, unread=unread)
    except UnreadableError as error:
        return error.message


def find_entry_damage(folder: Path, *, unread: str | None = None) -> str | None:
    """Return what is damaged, as `entry_damage`.

    Raises:
        UnreadableError: it cannot be read now, and may be whole: too many open files, no permission, a bad block.
    """
    if not os.path.lexists(folder):
        return None
    try:
        if folder.is_symlink() or not folder.is_dir():
            return "it is a link" if folder.is_symlink() else "it is no folder"
        if (folder / CHECKSUMS_FILE).is_symlink():
            return f"{CHECKSUMS_FILE} is a link, not a file"
        record = read_checksums(folder)
        if record is None or record.kind != KIND:
            return f"it has no {CHECKSUMS_FILE} (an earlier version wrote it, or a part is missing)"
        if record.key != folder.name:
            return "it is a copy of another entry"
        if added := sorted(set(list_files(folder)) - record.files.keys() - {CHECKSUMS_FILE}):
            return f"it has {added[0]}, which was not written with it"
        read = {name: entry for name, entry in record.files.items() if unread is None or not name.endswith(unread)}
        damage = compare(folder, read)
    except UnreadableError:
        raise
    except LoraError as error:
        return error.message
    except OSError as error:
        raise UnreadableError(f"it cannot be read: {error.strerror}") from error
    return damage[0] + (f", and {len(damage) - 1} more" if len(damage) > 1 else "") if damage else None
