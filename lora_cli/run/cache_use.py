"""Use of the cache's entries: a lock that readers share until they end, the time of the last use, what it is. No torch.

The lock is on checksums.json, which every entry has, so that reading adds no file. It is held by this process until it
ends; the process that removes an entry needs it alone. The time of last use is that of the same file.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.checksums import CHECKSUMS_FILE
from lora_cli.run.read_file import UnreadableError, read_json_object

ABOUT_FILE = "about.json"  # in an entry: what it is, for `lora cache`

_in_use: dict[Path, int] = {}  # descriptors of the entries that this process uses


class About(NamedTuple):
    """What an entry is."""

    what: str  # `the rows of train.jsonl`
    versions: dict[str, str]  # of what it was made by


def write_about(folder: Path, what: str, versions: Mapping[str, str]) -> None:
    """Write what an entry is into its folder, which is not yet at its final place."""
    atomic.write_json_unpublished(folder / ABOUT_FILE, About(what, dict(versions))._asdict())


def read_about(folder: Path) -> About | None:
    """Return what an entry is; None if it does not say, as those of earlier versions, or if it is damaged.

    Raises:
        UnreadableError: it cannot be read now.
    """
    try:
        value = read_json_object(folder / ABOUT_FILE)
    except UnreadableError:
        raise
    except LoraError:
        return None
    except OSError as error:  # a block of the disk
        raise UnreadableError(f"it cannot be read: {error.strerror}") from error
    what, versions = value.get("what"), value.get("versions")
    if not isinstance(what, str) or not isinstance(versions, dict):
        return None
    return About(what, {str(key): str(version) for key, version in versions.items()})


def mark_used(folder: Path) -> bool:
    """Hold the shared lock of an entry until this process ends, and set the time of its last use.

    Returns:
        False if the entry is gone, or is being removed. True also where it cannot be locked: on a file system without
        locks, or with too many open files.
    """
    key = Path(os.path.abspath(folder))
    try:
        descriptor = os.open(folder / CHECKSUMS_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        pass
    if not _is_at(folder / CHECKSUMS_FILE, descriptor):  # removed between the two calls, or made again
        os.close(descriptor)
        return False
    with suppress(OSError):  # of another user
        os.utime(descriptor)
    if (earlier := _in_use.pop(key, None)) is not None:
        os.close(earlier)
    _in_use[key] = descriptor
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def last_used(folder: Path) -> float:
    """Return when an entry was used last, in seconds since the epoch: made, or read by a command."""
    with suppress(OSError):
        return os.stat(folder / CHECKSUMS_FILE, follow_symlinks=False).st_mtime
    return os.lstat(folder).st_mtime


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Within the block, no process uses the entry `folder`, or makes it; yields False if one does."""
    descriptors: list[int] = []
    try:
        # The lock file is created where it is missing, as in a copy of a cache: who makes the entry would create it.
        yield all(
            _lock_alone(path, flags, descriptors)
            for path, flags in ((folder.with_name(f".lock-{folder.name}"), os.O_CREAT), (folder / CHECKSUMS_FILE, 0))
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _lock_alone(path: Path, flags: int, descriptors: list[int]) -> bool:
    """Lock a file alone, if there is one, and return whether no other process holds a lock on it."""
    try:
        descriptors.append(os.open(path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
    except FileNotFoundError:
        return True
    except OSError:  # a link, a folder in its place, or of another user: damage, or not ours to lock
        return not os.path.isfile(path) or os.path.islink(path)
    try:
        fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
