"""Renames that the standard library lacks: exchange two paths in one step, or rename only to a new name. No torch."""

import ctypes
import errno
import os
import sys
from pathlib import Path

# Flags of renameat2 (Linux) and renamex_np (macOS).
NOREPLACE, EXCHANGE = (1, 2) if sys.platform == "linux" else (4, 2)
AT_FDCWD = -100
# File systems and kernels without these flags.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two existing files or folders of one file system in one step; return False where that is not possible.

    Raises:
        OSError: one of them is missing, or cannot be renamed.
    """
    return _rename(first, second, EXCHANGE)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which must not exist. Another process may create it at any time.

    Raises:
        FileExistsError: `target` exists.
        OSError: it cannot be renamed.
    """
    if _rename(source, target, NOREPLACE):
        return
    if os.path.lexists(target):  # without the flag, a rename replaces files and empty folders
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Rename with a flag; return False if the system or the file system does not support it."""
    libc = ctypes.CDLL(None, use_errno=True)
    ends = os.fsencode(source), os.fsencode(target)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        result = libc.renameat2(AT_FDCWD, ends[0], AT_FDCWD, ends[1], flag)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(ends[0], ends[1], flag)
    else:
        return False
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
