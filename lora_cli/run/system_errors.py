"""Errors of the operating system: full disk, missing permission, vanished file, limit; how libraries report them.

Python and pyarrow raise OSError with a number. Rust libraries (safetensors, tokenizers) raise exceptions of their own,
whose text ends in `(os error 28)`, and torch a RuntimeError with `(12)` at its end. No torch.
"""

import errno
import os
import re
from pathlib import Path
from types import TracebackType

from lora_cli.errors import LoraError, one_line
from lora_cli.run.console import format_bytes
from lora_cli.run.disk_space import free_bytes, written_bytes

FREE_SPACE = "free some space"
PERMISSIONS = "check its permissions, or choose another path"
VANISHED = "check the path; it, or a folder above it, may have been removed or renamed while the command ran"
IN_THE_WAY = "something else is in its place: remove it, or choose another path"
# What the user can do. An OSError with another number is a bug, and keeps its traceback.
HINTS = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: f"{FREE_SPACE}, or ask for a larger quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose a path on another disk",
    errno.EROFS: "choose a writable path",
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EIO: "the disk reports that it cannot read or write: check it, or choose a path on another disk",
    errno.ENOENT: VANISHED,
    errno.ESTALE: VANISHED,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.ELOOP: IN_THE_WAY,
    errno.ENXIO: IN_THE_WAY,
    errno.EBUSY: "another program uses it: end it, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENOMEM: "end other programs, or use a machine with more memory",
}
# These concern the file that is being written, whatever file an exception names: shutil names the one that it copies.
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# These concern this machine, whatever a library was doing: no other file, URL or model would help.
OF_THIS_MACHINE = (*WRITING, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
LOCK = "lock"  # in the folder of a writer, held by it
OF_RUST = re.compile(r"\(os error (\d+)\)")
MISSING = re.compile(r"No such file or directory: (.+)")  # safetensors: a FileNotFoundError without a number
OF_TORCH = re.compile(r"unable to \w+ .*\((\d+)\)")


def system_error(error: BaseException | None) -> OSError | None:
    """Return an exception of any library as OSError with a number, if it reports an error of the operating system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if error is None or isinstance(error, LoraError):
        return None
    if missing := MISSING.fullmatch(str(error)):
        return _error(errno.ENOENT, Path(missing[1]))
    match = OF_RUST.search(str(error)) or (OF_TORCH.search(str(error)) if isinstance(error, RuntimeError) else None)
    return None if match is None else _error(int(match[1]))


def describe(error: OSError) -> str:
    """Return the path and the problem in one line."""
    if error.errno == errno.ENOENT and not _has_working_folder():
        return "the working folder does not exist any more"
    if error.filename is not None:
        return f"{one_line(os.fsdecode(error.filename), limit=200)}: {error.strerror}"
    if error.errno is None:
        return one_line(str(error))
    return os.strerror(error.errno)  # pyarrow's own text has two lines


class as_os_error:  # used like a function: `with as_os_error(path, temporary):`
    """Context manager that turns libraries' own exceptions for errors of the operating system into OSError.

    With `result`, errors of writing it name the result instead of a temporary file, and any exception becomes one about
    the result if the temporary folder has vanished. All other exceptions pass.
    """

    def __init__(self, result: Path | None = None, temporary: Path | None = None) -> None:
        """`result` is written in the folder `temporary`; without one, the block creates that folder beside `result`."""
        self._result, self._temporary = result, temporary

    def __enter__(self) -> None:
        return

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._has_vanished() and isinstance(error, Exception) and self._result is not None:
            # Whatever a library says of it: the folder was removed or renamed.
            raise _error(errno.ENOENT, self._result) from error
        found = system_error(error)
        if found is None or found.errno not in HINTS:
            return
        named = None if found.filename is None else Path(os.fsdecode(found.filename))
        if named is not None and named == self._result:
            return  # a workspace within this one has described it
        if self._result is not None and (named is None or found.errno in WRITING or self._is_temporary(named)):
            raise _error(found.errno, self._result, self._space(found.errno)) from error
        if found is not error:
            raise found from error

    def _has_vanished(self) -> bool:
        return self._temporary is not None and not self._temporary.is_dir()

    def _is_temporary(self, path: Path) -> bool:
        if self._temporary is not None:
            return self._temporary in (path, *path.parents)
        return self._result is not None and self._result.parent in path.parents

    def _space(self, number: int) -> str:
        """Return how much was written and is free, for the message on a full disk."""
        if number != errno.ENOSPC or self._temporary is None or not self._temporary.is_dir():
            return ""
        written, free = written_bytes(self._temporary, without=LOCK), free_bytes(self._temporary)
        return f" ({format_bytes(written)} of it were written, {format_bytes(free or 0)} are free)"


def _error(number: int, path: Path | None = None, more: str = "") -> OSError:
    return OSError(number, os.strerror(number) + more, None if path is None else str(path))


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
