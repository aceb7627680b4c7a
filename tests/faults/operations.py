"""Act before one file operation of this process: kill it, let it fail, remove a folder, limit the size of files.

Operations are the interpreter's audit events of opening, renaming, removing, creating, linking, changing and listing
paths, calls of fsync, and renameat2 through ctypes. Only those in one folder count. The writers of safetensors and
Arrow are native code: their files are no operations, and the limit on file sizes stops the process within them.
"""

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHANGES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink", "os.utime",
)  # fmt: skip
LISTS = ("os.listdir", "os.scandir")
CREATING = ("open for writing", "os.mkdir")
RENAMES = ("renameat2", "renamex_np")  # functions of the C library
# Errors that are injected, and whether only operations that write can have them.
ERRORS = {errno.ENOSPC: True, errno.EDQUOT: True, errno.EIO: False, errno.EACCES: False, errno.EMFILE: False}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Operation(NamedTuple):
    """A file operation that is about to happen."""

    number: int
    name: str  # of the event
    path: str  # in the folder, or as the program gave it
    changes: bool  # whether it may change the folder: opening for reading, listing and fsync do not

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


Action = Callable[[Operation], None]


def call_before_operations(folder: Path, action: Action) -> None:
    """Call `action` before each file operation in `folder`, for the rest of the life of this process.

    Args:
        folder: the working folder of the process. Relative paths count, too: the standard library removes folders by
            names relative to an open folder.
        action: it may raise OSError, end the process, or return.
    """
    home, count, inside = f"{folder.resolve()}{os.sep}", 0, False

    def before(name: str, path: object, *, changes: bool) -> None:
        nonlocal count, inside
        if inside:
            return
        inside = True
        try:
            text = _text(path)
            if not os.path.isabs(text) or f"{text}{os.sep}".startswith(home):
                count += 1
                action(Operation(count - 1, name, text.removeprefix(home), changes))
        finally:
            inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, int):
                changes = bool((flags or 0) & WRITING) or any(letter in (mode or "") for letter in "wax+")
                before("open for writing" if changes else "open", path, changes=changes)
        elif event in CHANGES:
            before(event, arguments[0], changes=True)
        elif event in LISTS:
            before(event, "." if arguments[0] is None else arguments[0], changes=False)
        elif event == "ctypes.dlsym" and arguments[1] in RENAMES:
            before("renameat2", ".", changes=True)

    fsync = os.fsync  # it has no event

    def fsync_after_action(descriptor: Any) -> None:
        before("fsync", descriptor if isinstance(descriptor, int) else descriptor.fileno(), changes=False)
        fsync(descriptor)

    os.fsync = fsync_after_action
    sys.addaudithook(hook)


def _text(path: object) -> str:
    """Return the path of an operation; that of an open file where the system tells it."""
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.fsdecode(path)
    try:
        return os.readlink(f"/proc/self/fd/{path}")
    except OSError:
        return f"file {path}"


def record_in(file: Path) -> Action:
    """Return an action that appends a line for each operation to `file`."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def record(operation: Operation) -> None:
        os.write(descriptor, f"{int(operation.changes)} {operation}\n".encode(errors="replace"))

    return record


def kill_at(number: int) -> Action:
    """Return an action that kills the process with SIGKILL before its operation `number`."""

    def kill(operation: Operation) -> None:
        if operation.number == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def kill_after(number: int, size: int) -> Action:
    """Return an action that lets the process live until, after its operation `number`, a file exceeds `size` bytes.

    The system writes up to `size` bytes, and ends the process with SIGXFSZ at the next byte: also in native code.
    """

    def limit(operation: Operation) -> None:
        if operation.number == number:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit_file_size(size)

    return limit


def fail_at(number: int, code: int, *, lasting: bool) -> Action:
    """Return an action that lets operation `number` fail with the error `code`.

    Args:
        number: of the operation.
        code: of errno, such as ENOSPC.
        lasting: whether all later attempts to create files and folders fail, too, as on a full disk.
    """

    def fail(operation: Operation) -> None:
        again = lasting and operation.number > number and operation.name in CREATING
        if operation.number == number or again:
            raise OSError(code, os.strerror(code), operation.path)

    return fail


def remove_at(number: int, path: str) -> Action:
    """Return an action that removes the file or folder `path` before operation `number`, as another program might."""

    def remove(operation: Operation) -> None:
        if operation.number == number:
            for found in [Path()] if path == "." else list(Path().glob(path)):
                if found.is_dir() and not found.is_symlink():
                    shutil.rmtree(found.absolute(), ignore_errors=True)
                else:
                    found.unlink()

    return remove


def limit_file_size(size: int) -> None:
    """Let writes beyond `size` bytes of a file fail (EFBIG, as with `ulimit -f`)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
