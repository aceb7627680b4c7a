"""Workspaces of atomic writes: a locked folder next to the result; removal of what killed writers left. No torch.

A writer works in a folder `.tmp-NAME-XXXXXXXX` next to the result, and holds a lock on the file `lock` in it until it
is done; `remove_leftovers` removes the folders whose locks are free, on any machine and in any container, and completes
a replacement of several files that had begun.
"""

import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.read_file import read_json_object
from lora_cli.run.rename import rename_without_replacing
from lora_cli.run.signals import at_end
from lora_cli.run.system_errors import LOCK, as_os_error

WORKSPACE = re.compile(r"\.tmp-(?P<name>.+)-[0-9a-f]{8}")
COMMIT = "commit.json"  # in a workspace: all its files are complete, and are being renamed
OLD = "old"  # in a workspace: a folder with the result that is being replaced
REMOVED = "removed"  # in a workspace: a result that is being deleted
MAX_NAME_BYTES = 200  # of a result in the name of its workspace; file systems allow 255 bytes for all


@contextmanager
def open_workspace(path: Path) -> Iterator[Path]:
    """Yield a new locked folder next to `path`, which is removed with its files when the block ends.

    Raises:
        OSError: of any error of the operating system, also in libraries; it names `path`, not a file in the workspace.
    """
    descriptor = None
    while descriptor is None:
        workspace = new_path(path)
        with at_end(partial(_abandon, workspace)):
            with as_os_error(path):
                descriptor = create(workspace)
            if descriptor is None:
                continue
            try:
                with as_os_error(path, workspace):
                    yield workspace
            finally:
                _delete(workspace)
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


@contextmanager
def reserve(path: Path) -> Iterator[None]:
    """Within the block, no other process can reserve the place of the result `path`.

    Raises:
        BlockingIOError: a living process has a workspace for it; its id is the argument.
        OSError: no workspace can be created.
    """
    with ExitStack() as stack:
        with _locked_folder(path.parent):  # of two processes that start together, one sees the other
            if (writer := _find_writer(path)) is not None:
                raise BlockingIOError(writer)
            stack.enter_context(open_workspace(path))
        yield


def _find_writer(path: Path) -> str | None:
    """Return the id of a living process that has a workspace for the result `path`."""
    for workspace in path.parent.glob(f".tmp-{glob.escape(_short(path.name))}-*"):
        if WORKSPACE.fullmatch(workspace.name) and not workspace.is_symlink() and not _is_free(workspace):
            with suppress(OSError):
                return (workspace / LOCK).read_text(encoding="ascii", errors="replace")[:20] or "another"
    return None


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on an existing folder; without it where another program holds one for longer than a second."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def commit(workspace: Path, paths: Sequence[Path], *, replace: bool) -> None:
    """Rename the files that are still in the workspace to their places; new ones all, or, after an error, none."""
    if replace:
        for description in paths[1:]:
            if (workspace / description.name).exists():
                description.unlink(missing_ok=True)  # of the result that is replaced next
    done: list[Path] = []
    try:
        for path in paths:
            if (new := workspace / path.name).exists():
                new.replace(path) if replace else rename_without_replacing(new, path)
                done.append(path)
    except OSError:
        for path in done if not replace else ():
            with suppress(OSError):
                path.rename(workspace / path.name)
        raise
    sync(workspace.parent)


def _complete(workspace: Path) -> None:
    """Complete a replacement whose writer was killed between two renames."""
    parent = workspace.parent
    if os.path.lexists(workspace / COMMIT):
        with suppress(LoraError, FileExistsError):  # a commit file that is cut off: no rename was done
            record = read_json_object(workspace / COMMIT)
            names = record.get("names")
            # Only names in this folder: the workspace may have come with a folder of another user.
            if isinstance(names, list) and all(map(_is_name, names)):
                commit(workspace, [parent / name for name in names], replace=record.get("replace") is True)
        return
    for old in (workspace / OLD).iterdir() if (workspace / OLD).is_dir() else ():
        if not os.path.lexists(parent / old.name):
            old.rename(parent / old.name)
            sync(parent)


def _is_name(name: object) -> bool:
    """Return whether a value is the name of an entry of a folder, not a path out of it."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


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


def new_path(path: Path) -> Path:
    """Return a path for a workspace of the result `path`, with a random name."""
    return path.parent / f".tmp-{_short(path.name)}-{secrets.token_hex(4)}"


def _short(name: str) -> str:
    """Return the name of a result in the name of its workspace: a digest if it is too long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME_BYTES else hashlib.blake2b(encoded, digest_size=16).hexdigest()


def create(workspace: Path) -> int | None:
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
            os.write(descriptor, str(os.getpid()).encode())  # for messages
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


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
