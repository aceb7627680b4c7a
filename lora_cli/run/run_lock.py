"""The lock of a run folder: held by the process that trains the run, and seen by all others. No torch."""

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from lora_cli.errors import LoraError

LOCK = ".lora-lock"


def lock_run(path: Path) -> int:
    """Lock the run folder `path` until the descriptor that is returned is closed, or the process ends.

    Raises:
        LoraError: another process has locked it, or something else is in place of the lock file.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path / LOCK).st_mode):
            raise LoraError(f"{path / LOCK} is not a file of lora", hint="remove it, or set another output")
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "another"
        os.close(lock)
        raise LoraError(
            f"{path} is in use by process {holder}", hint="wait for it, stop it, or set another output"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def user_of_run(path: Path) -> str | None:
    """Return the id of the process that has locked the run folder `path`; None if no process uses it."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no lock file, or a link
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 20, 0).decode(errors="replace").strip() or "another"
    finally:
        os.close(lock)
    return None
