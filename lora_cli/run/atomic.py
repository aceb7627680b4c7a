"""Atomic writes and removals of files and folders: written to a temporary place, fsynced, renamed. No torch.

All results are written here. A reader finds the complete old or the complete new result, even if the writer is killed
at any point; see `workspace.py` for what it leaves then.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_cli.run.rename import exchange, rename_without_replacing
from lora_cli.run.system_errors import as_os_error
from lora_cli.run.workspace import COMMIT, OLD, REMOVED, commit, open_workspace, remove_leftovers, sync


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to the file `path`; an existing file is replaced."""
    with file(path, replace=True) as temporary, temporary.open("xb") as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file `path` as UTF-8; an existing file is replaced."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write `value` to the file `path` as indented JSON; an existing file is replaced.

    Raises:
        TypeError, ValueError: a value that JSON cannot represent, such as NaN; an existing file is unchanged.
    """
    write_text(path, _to_json(value))


def write_json_unpublished(path: Path, value: object) -> None:
    """Write `value` as indented JSON to a file of a folder that is not yet at its final place; it may be a part of one.

    In place: a temporary place inside the folder could be left there, and be published with it.

    Raises:
        TypeError, ValueError: as for `write_json`; an existing file is unchanged.
        OSError: it cannot be written, or `path` is a link.
    """
    text = _to_json(value)
    with as_os_error(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def raise_error(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed: by default, `os.walk` passes over it."""
    raise error


@contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder, which is renamed to `path` if the block ends without an exception.

    Args:
        path: the final path of the folder.
        replace: replace an existing folder; without it, an existing folder is an error.

    Raises:
        FileExistsError: `path` exists and `replace` is False; checked before and after the block.
    """
    with suppress(OSError):  # the write itself reports what stands in the way
        remove_leftovers(path.parent, path.name)
    _check_new(path, replace=replace)
    with open_workspace(path) as workspace:
        new = workspace / path.name
        new.mkdir()
        yield new
        move_folder(new, path, replace=replace)


def move_folder(new: Path, path: Path, *, replace: bool = False) -> None:
    """Flush the complete folder `new` to disk and rename it to `path`, on the same file system.

    An existing folder at `path` is replaced in one step, and then deleted.

    Raises:
        FileExistsError: `path` exists and `replace` is False.
    """
    for parent, _, names in os.walk(new, onerror=raise_error):
        for name in names:
            # safetensors makes files readable by their owner only, but another user may serve the adapter.
            Path(parent, name).chmod(0o666 & ~_umask())
            sync(Path(parent, name))
        sync(Path(parent))
    if not (replace and os.path.lexists(path)):
        rename_without_replacing(new, path)
    elif exchange(new, path):
        remove(new)  # the old folder
    else:
        _replace_by_two_renames(new, path)
    sync(path.parent)


def _replace_by_two_renames(new: Path, path: Path) -> None:
    """Replace a folder where the file system cannot exchange two paths.

    Between the renames the old folder is in a workspace, from which `remove_leftovers` restores it.
    """
    with open_workspace(path) as workspace:
        (workspace / OLD).mkdir()
        old = path.rename(workspace / OLD / path.name)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise


@contextmanager
def file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path of the same name; the file that the block creates there is renamed to `path` at its end.

    Args:
        path: the final path of the file.
        replace: replace an existing file; without it, an existing file is an error.

    Raises:
        FileExistsError: `path` exists and `replace` is False; checked before and after the block.
    """
    with files([path], replace=replace) as (temporary,):
        yield temporary


@contextmanager
def files(paths: Sequence[Path], *, replace: bool = False) -> Iterator[list[Path]]:
    """Yield temporary paths of the same names; the files that the block creates there are renamed at its end.

    The files belong together, such as a result and its description. A kill at any point leaves the old files, or a
    part of the new ones, or no description, but never a result with the description of another one. Once all files are
    complete, `remove_leftovers` completes the renames of a killed process.

    Args:
        paths: the final paths, in one folder; the first is the result.
        replace: replace existing files; without it, an existing file is an error.

    Raises:
        FileExistsError: a path exists and `replace` is False; checked before and after the block.
    """
    with suppress(OSError):
        remove_leftovers(paths[0].parent, paths[0].name)
    for path in paths:
        _check_new(path, replace=replace)
    with open_workspace(paths[0]) as workspace:
        yield [workspace / path.name for path in paths]
        for path in paths:
            sync(workspace / path.name)
        if len(paths) > 1:
            _write_synced(workspace / COMMIT, json.dumps({"names": [path.name for path in paths], "replace": replace}))
            sync(workspace)
        commit(workspace, paths, replace=replace)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path` for intermediate files; it is removed when the block ends, also by an exception."""
    with open_workspace(path) as workspace:
        (workspace / "files").mkdir()
        yield workspace / "files"


def remove(path: Path) -> None:
    """Remove a file or folder; a kill at any point leaves it complete, or gone. A link is removed, not its target."""
    with open_workspace(path) as workspace:
        path.rename(workspace / REMOVED)


@contextmanager
def lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created; call `on_wait` if another process holds it.

    The operating system releases the lock when the process ends. The file is not deleted: a process that waits for the
    deleted file and one that creates a new file would both get a lock.

    Raises:
        OSError: `path` is a link or not a regular file, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe that another process reads, a device
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_new(path: Path, *, replace: bool) -> None:
    if not replace and os.path.lexists(path):
        raise FileExistsError(f"{path} exists")


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
