"""Atomic writes of files and folders: written to a temporary path, fsynced, renamed. No torch.

All results are written here. A reader finds the complete old or the complete new result, even if the writer is killed
at any point. `remove_leftovers` removes the temporary paths of killed writers.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFTOVER = re.compile(r"\.(tmp|old)-(?P<name>.+)-(?P<pid>\d+)-[0-9a-f]{8}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to the file `path`; an existing file is replaced."""
    temporary = _temporary_path(path, "tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file `path` as UTF-8; an existing file is replaced."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write `value` to the file `path` as indented JSON; an existing file is replaced.

    Raises:
        TypeError, ValueError: a value that JSON cannot represent, such as NaN; an existing file is unchanged.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`, which is renamed to `path` if the block ends without an exception.

    Args:
        path: the final path of the folder.
        replace: replace an existing folder; without it, an existing folder is an error.

    Raises:
        FileExistsError: `path` exists and `replace` is False; checked before and after the block.
    """
    if not replace and path.exists():
        raise FileExistsError(f"{path} exists")
    temporary = _temporary_path(path, "tmp")
    try:  # includes mkdir: an interrupt may come right after it
        temporary.mkdir()
        yield temporary
        move_folder(temporary, path, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(new: Path, path: Path, *, replace: bool = False) -> None:
    """Flush the complete folder `new` to disk and rename it to `path`, both in one parent folder.

    Raises:
        FileExistsError: `path` exists and `replace` is False.
    """
    for parent, _, names in os.walk(new):
        for name in names:
            # safetensors makes files readable by their owner only, but another user may serve the adapter.
            Path(parent, name).chmod(0o666 & ~_umask())
            sync(Path(parent, name))
        sync(Path(parent))
    _rename_into_place(new, path, replace=replace)
    sync(path.parent)


@contextmanager
def file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file that the block creates there is renamed to `path` at its end.

    Args:
        path: the final path of the file.
        replace: replace an existing file; without it, an existing file is an error.

    Raises:
        FileExistsError: `path` exists and `replace` is False; checked before and after the block.
    """
    if not replace and path.exists():
        raise FileExistsError(f"{path} exists")
    temporary = _temporary_path(path, "tmp")
    try:
        yield temporary
        sync(temporary)
        if not replace and path.exists():
            raise FileExistsError(f"{path} exists")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path` for intermediate files; it is removed when the block ends, also by an exception."""
    temporary = _temporary_path(path, "tmp")
    try:  # includes mkdir: an interrupt may come right after it
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created; call `on_wait` if another process holds it.

    The operating system releases the lock when the process ends. The file is not deleted: a process that waits for the
    deleted file and one that creates a new file would both get a lock.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rename_into_place(new: Path, path: Path, *, replace: bool) -> None:
    if not (replace and path.exists()):
        try:
            new.rename(path)
        except OSError:
            if path.exists():  # another process created it first
                raise FileExistsError(f"{path} exists") from None
            raise
        return
    # No portable call swaps two folders. Between the renames the old folder has a temporary name, from which
    # `remove_leftovers` restores it.
    old = _temporary_path(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove the temporary paths of killed processes from `parent`, and restore a folder whose replacement was killed.

    Only processes of this machine can be checked. If other machines write to `parent` too, the caller must have the
    lock on all results there; with `name`, the lock on that result.

    Args:
        parent: the folder; it may be missing.
        name: the result whose leftovers are removed; None for all.
    """
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if not match or name not in (None, match["name"]) or _is_running(int(match["pid"])):
            continue
        target = parent / match["name"]
        # Another process may be removing the same leftovers.
        with suppress(FileNotFoundError):
            if match[1] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _temporary_path(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
