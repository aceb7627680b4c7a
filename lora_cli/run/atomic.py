"""The only writer of results: written beside their place, fsynced, and renamed into it. No torch.

Whoever reads a path finds what was there before or what is there now, whole, however the writer died. What a
killed writer left beside it, `sweep` clears.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFTOVER = re.compile(r"\.(tmp|old)-(?P<name>.+)-(?P<pid>\d+)-[0-9a-f]{8}")


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`, in place of any file there."""
    beside = _temporary_path(path, "tmp")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Put `text` into the file `path` as UTF-8, in place of any file there."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Put `value` into the file `path` as JSON for people to read, in place of any file there."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to write into, which becomes `path` when the block ends well.

    Args:
        path: where the folder is meant to be.
        replace: swap it for a folder that is there; without it, one that is there is an error.

    Raises:
        FileExistsError: `path` is not to be replaced, and exists: found before anything is written, or at the end.
    """
    if not replace and path.exists():
        raise FileExistsError(f"{path} exists")
    beside = _temporary_path(path, "tmp")
    try:  # from here on: an interrupt may come as soon as the folder is there
        beside.mkdir()
        yield beside
        for parent, _, names in os.walk(beside):
            for name in names:
                # safetensors keeps its files to their owner; whoever serves the adapter may be another user.
                Path(parent, name).chmod(0o666 & ~_umask())
                _sync(Path(parent, name))
            _sync(Path(parent))
        _rename_into_place(beside, path, replace=replace)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync(path.parent)


@contextmanager
def file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A place beside `path` for a file that becomes `path` when the block ends well; nothing is there yet.

    Args:
        path: where the file is meant to be.
        replace: take the place of a file that is there; without it, one that is there is an error.

    Raises:
        FileExistsError: `path` is not to be replaced, and exists: found before anything is written, or at the end.
    """
    if not replace and path.exists():
        raise FileExistsError(f"{path} exists")
    beside = _temporary_path(path, "tmp")
    try:
        yield beside
        _sync(beside)
        if not replace and path.exists():
            raise FileExistsError(f"{path} exists")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is needed on the way to it, gone afterwards however the block ends."""
    beside = _temporary_path(path, "tmp")
    try:  # from here on: an interrupt may come as soon as the folder is there
        beside.mkdir()
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _rename_into_place(new: Path, path: Path, *, replace: bool) -> None:
    if not (replace and path.exists()):
        try:
            new.rename(path)
        except OSError:
            if path.exists():  # another was first
                raise FileExistsError(f"{path} exists") from None
            raise
        return
    # No portable call exchanges two folders. Between the renames the old one is only aside, under a name by
    # which `sweep` puts it back.
    old = _temporary_path(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Clear what killed processes left in `parent`: half-written results go, a folder put aside comes back.

    Only this machine's processes are known. So whoever sweeps where other machines write holds the lock on all that
    is written there, or on the one result `name`, and then sweeps that alone.
    """
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if not match or name not in (None, match["name"]) or _is_running(int(match["pid"])):
            continue
        meant = parent / match["name"]
        # Another process may be sweeping the same: what it took first is no error.
        with suppress(FileNotFoundError):
            if match[1] == "old" and not meant.exists():
                path.rename(meant)
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


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
