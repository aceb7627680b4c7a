"""Atomic writes and removals of files and folders: written to a temporary place, fsynced, renamed. No torch.

All results are written here. A reader finds the complete old or the complete new result, even if the writer is killed
at any point. A writer works in a folder `.tmp-NAME-XXXXXXXX` next to the result, and holds a lock on the file `lock` in
it until it is done; `remove_leftovers` removes the folders whose locks are free, on any machine and in any container,
and completes a replacement of several files that had begun. The next writer of the same result does this first.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lora_cli.run.rename import exchange, rename_without_replacing
from lora_cli.run.signals import at_end
from lora_cli.run.system_errors import as_os_error

WORKSPACE = re.compile(r"\.tmp-(?P<name>.+)-[0-9a-f]{8}")
LOCK = "lock"  # in a workspace: held by its writer
COMMIT = "commit.json"  # in a workspace: all its files are complete, and are being renamed
OLD = "old"  # in a workspace: a folder with the result that is being replaced
REMOVED = "removed"  # in a workspace: a result that is being deleted
MAX_NAME_BYTES = 200  # of a result in the name of its workspace; file systems allow 255 bytes for all


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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder, which is renamed to `path` if the block ends without an exception.

    Args:
        path: the final path of the folder.
        replace: replace an existing folder; without it, an existing folder is an error.

    Raises:
        FileExistsError: `path` exists and `replace` is False; checked before and after the block.
    """
    remove_leftovers(path.parent, path.name)
    _check_new(path, replace=replace)
    with _workspace(path) as workspace:
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
    for parent, _, names in os.walk(new):
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
    with _workspace(path) as workspace:
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
    remove_leftovers(paths[0].parent, paths[0].name)
    for path in paths:
        _check_new(path, replace=replace)
    with _workspace(paths[0]) as workspace:
        yield [workspace / path.name for path in paths]
        for path in paths:
            sync(workspace / path.name)
        if len(paths) > 1:
            _write_synced(workspace / COMMIT, json.dumps({"names": [path.name for path in paths], "replace": replace}))
            sync(workspace)
        _commit(workspace, paths, replace=replace)


def _commit(workspace: Path, paths: Sequence[Path], *, replace: bool) -> None:
    """Rename the files that are still in the workspace to their places."""
    if replace:
        for description in paths[1:]:
            if (workspace / description.name).exists():
                description.unlink(missing_ok=True)  # of the result that is replaced next
    for path in paths:
        if (new := workspace / path.name).exists():
            new.replace(path) if replace else rename_without_replacing(new, path)
    sync(paths[0].parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path` for intermediate files; it is removed when the block ends, also by an exception."""
    with _workspace(path) as workspace:
        (workspace / "files").mkdir()
        yield workspace / "files"


def remove(path: Path) -> None:
    """Remove a file or folder; a kill at any point leaves it complete, or gone. A link is removed, not its target."""
    with _workspace(path) as workspace:
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


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove the workspaces of killed processes from `parent`, and complete replacements that had begun.

    Args:
        parent: the folder; it may be missing.
        name: the result whose leftovers are removed; None for all.
    """
    for workspace in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = WORKSPACE.fullmatch(workspace.name)
        if match and (name is None or match["name"] == _short(name)) and not workspace.is_symlink():
            # Another process may be removing the same leftovers.
            with suppress(FileNotFoundError, NotADirectoryError):
                _clean(workspace)


def is_being_written(path: Path) -> bool:
    """Return whether a living process has a workspace for the result `path`."""
    return any(
        not workspace.is_symlink() and not _is_free(workspace)
        for workspace in path.parent.glob(f".tmp-{glob.escape(_short(path.name))}-*")
        if WORKSPACE.fullmatch(workspace.name)
    )


def _clean(workspace: Path) -> None:
    """Remove one workspace, unless its writer lives."""
    if not os.path.lexists(workspace / LOCK):
        with suppress(OSError):
            workspace.rmdir()  # only if empty: the folder of another program stays
        return
    descriptor = _try_lock(workspace)
    if descriptor is None:
        return
    try:
        _complete(workspace)
        _delete(workspace)
    finally:
        os.close(descriptor)


def _complete(workspace: Path) -> None:
    """Complete a replacement whose writer was killed between two renames."""
    parent = workspace.parent
    if (workspace / COMMIT).is_file():
        with suppress(ValueError, FileExistsError):  # a commit file that is cut off: no rename was done
            commit = json.loads((workspace / COMMIT).read_text(encoding="utf-8"))
            _commit(workspace, [parent / name for name in commit["names"]], replace=commit["replace"])
        return
    for old in (workspace / OLD).iterdir() if (workspace / OLD).is_dir() else ():
        if not os.path.lexists(parent / old.name):
            old.rename(parent / old.name)
            sync(parent)


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """Yield a new locked folder next to `path`, which is removed with its files when the block ends.

    Raises:
        OSError: of any error of the operating system, also in libraries; it names `path`, not a file in the workspace.
    """
    descriptor = None
    while descriptor is None:
        workspace = _new_path(path)
        with at_end(partial(_abandon, workspace)):
            with as_os_error(path):
                descriptor = _create(workspace)
            if descriptor is None:
                continue
            try:
                with as_os_error(path, workspace):
                    yield workspace
            finally:
                _delete(workspace)
                os.close(descriptor)


def _new_path(path: Path) -> Path:
    return path.parent / f".tmp-{_short(path.name)}-{secrets.token_hex(4)}"


def _abandon(workspace: Path) -> None:
    """Complete or remove a workspace of this process, whose main thread does nothing any more."""
    _complete(workspace)
    for _ in range(100):  # other threads may still be creating files
        _delete(workspace)
        with suppress(OSError):
            workspace.rmdir()  # without a lock yet
        if not workspace.exists():
            return


def _delete(workspace: Path) -> None:
    """Delete a locked workspace, the lock last: without it, the rest would never be taken for a leftover."""
    # Removed by another program, an entry that could not be deleted, no free descriptor: lock and folder stay.
    with suppress(OSError):
        for entry in list(workspace.iterdir()):
            if entry.name != LOCK:
                _delete_entry(entry)
        if [entry.name for entry in workspace.iterdir()] == [LOCK]:
            (workspace / LOCK).unlink()
            workspace.rmdir()


def _delete_entry(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()


def _create(workspace: Path) -> int | None:
    """Create a workspace, and return the descriptor that holds its lock; None if another process has the name."""
    try:
        workspace.mkdir()
    except FileExistsError:
        return None
    try:
        return _lock_new(workspace)
    except BaseException:
        with suppress(OSError):  # rmtree would need descriptors, of which the process may have none left
            (workspace / LOCK).unlink(missing_ok=True)
            workspace.rmdir()
        raise


def _lock_new(workspace: Path) -> int | None:
    """Return a descriptor that holds the lock of a new workspace; None if another process took it for a leftover."""
    try:
        descriptor = os.open(workspace / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileNotFoundError:
        if not workspace.parent.is_dir():
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(workspace / LOCK)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks: `_try_lock` fails there too, and nothing is taken for a leftover
        return descriptor
    os.close(descriptor)
    return None


def _try_lock(workspace: Path) -> int | None:
    """Return a descriptor that holds the lock of a workspace whose writer has ended; None if it lives, or is gone."""
    try:
        descriptor = os.open(workspace / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # removed, a link, or of another user
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(workspace / LOCK)):
            return descriptor
    except OSError:  # held, removed in between, or a file system without locks
        pass
    os.close(descriptor)
    return None


def _is_free(workspace: Path) -> bool:
    descriptor = _try_lock(workspace)
    if descriptor is None:
        return not os.path.lexists(workspace / LOCK)
    os.close(descriptor)
    return True


def _check_new(path: Path, *, replace: bool) -> None:
    if not replace and os.path.lexists(path):
        raise FileExistsError(f"{path} exists")


def _short(name: str) -> str:
    """Return the name of a result in the name of its workspace: a digest if it is too long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME_BYTES else hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


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
