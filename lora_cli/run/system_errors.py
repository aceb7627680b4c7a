"""Errors of the operating system: full disk, missing permission, vanished file, limit; how libraries report them.

Python and pyarrow raise OSError with a number. Rust libraries (safetensors, tokenizers) raise exceptions of their own,
whose text ends in `(os error 28)`; numpy tells only how much it could write; torch ends in `No space left (28)`. No torch.
"""

import errno
import os
import re
import resource
import sys
from pathlib import Path
from types import TracebackType

from lora_cli.run.console import format_bytes
from lora_cli.run.disk_space import free_bytes, written_bytes

FREE_SPACE = "free some space"
PERMISSIONS = "check its permissions, or choose another path"
VANISHED = "it, or a folder above it, was removed or renamed while the command ran"
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
OF_RUST = re.compile(r"\(os error (\d+)\)")
OF_TORCH = re.compile(r"unable to \w+ .*\((\d+)\)")
OF_NUMPY = re.compile(r"(\d+) requested and \d+ written")
SMALL_REST = 1 << 20  # bytes: a disk with less is full, since file systems keep some for themselves


def system_error(error: BaseException | None, place: Path | None = None) -> OSError | None:
    """Return an exception as OSError with number and text, if it reports an error of the operating system.

    Args:
        error: of any library.
        place: the folder that was being written to, for libraries that do not tell why they could not write.
    """
    if error is None:
        return None
    if isinstance(error, OSError):
        if error.errno is not None:
            return error
        match = OF_NUMPY.fullmatch(str(error))
        return None if match is None else _error(_why_not_written(place), None)
    match = OF_RUST.search(str(error)) or (OF_TORCH.search(str(error)) if isinstance(error, RuntimeError) else None)
    return None if match is None else _error(int(match[1]), None)


def describe(error: OSError) -> str:
    """Return the path and the problem in one line."""
    text = os.strerror(error.errno or 0) if error.filename is None else error.strerror
    if error.filename is None and error.errno == errno.ENOENT and not _has_working_folder():
        return "the working folder does not exist any more"
    return text if error.filename is None else f"{os.fsdecode(error.filename)}: {text}"


class naming:  # used like a function: `with naming(path, temporary):`
    """Context manager of a writer: errors of the operating system within it name the result, not a temporary file.

    Libraries' own exceptions for such errors become OSError too. All other exceptions pass.
    """

    def __init__(self, result: Path, temporary: Path | None = None) -> None:
        """`result` is written in the folder `temporary`; without one, only its path is known."""
        self._result, self._temporary = result, temporary

    def __enter__(self) -> None:
        return

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = system_error(error, self._temporary)
        if found is None or found.errno not in HINTS or isinstance(found, BrokenPipeError):
            return
        named = None if found.filename is None else Path(os.fsdecode(found.filename))
        if named is None or found.errno in WRITING or self._is_temporary(named):
            raise _error(found.errno, self._result, self._space(found.errno)) from error
        if found is not error:
            raise found from error

    def _is_temporary(self, path: Path) -> bool:
        if self._temporary is None:
            return path.parent == self._result.parent
        return self._temporary in (path, *path.parents)

    def _space(self, number: int) -> str:
        """Return how much was written and is free, for the message on a full disk."""
        free = free_bytes(self._temporary) if self._temporary is not None and self._temporary.is_dir() else None
        if number != errno.ENOSPC or free is None or self._temporary is None:
            return ""
        return f" ({format_bytes(written_bytes(self._temporary))} were written, {format_bytes(free)} are free)"


class converting_library_errors:  # used like a function: `with converting_library_errors():`
    """Context manager that turns libraries' own exceptions for errors of the operating system into OSError."""

    def __enter__(self) -> None:
        return

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = system_error(error)
        if found is not None and found is not error and found.errno in HINTS:
            raise found from error


def _error(number: int, path: Path | None, more: str = "") -> OSError:
    return OSError(number, os.strerror(number) + more, None if path is None else str(path))


def _why_not_written(place: Path | None) -> int:
    """Return the number of the likely reason why a file in `place` could be written only in part."""
    free = free_bytes(place) if place is not None and place.is_dir() else None
    if free is not None and free < SMALL_REST:
        return errno.ENOSPC
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited else errno.EIO


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
