"""A small file system in memory (tmpfs) that only one process and its children see, for full disks. Linux only."""

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # sched.h
PAGE = 4096


class MountError(OSError):
    """A file system cannot be mounted here."""


def used_space(folder: Path) -> int:
    """Return the bytes that a copy of `folder` takes in a file system in memory."""
    return sum(-(-path.lstat().st_size // PAGE) * PAGE + PAGE for path in folder.rglob("*"))


def mount_small_disk(folder: Path, size: int) -> None:
    """Mount a file system of `size` bytes at `folder`, in a namespace of this process: it ends with the process.

    Raises:
        MountError: not possible on this system, or not permitted.
    """
    _enter_namespace()
    _call("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder))


def enlarge(folder: Path) -> None:
    """Give a small disk more space than any case needs."""
    _call("mount", "-o", "remount,size=1g", str(folder))


def unmount(folder: Path) -> None:
    """Remove a small disk, also if a process that was left over is in it."""
    _call("umount", "--lazy", str(folder))


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MountError(f"{command[0]}: {error}") from None


def _enter_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise MountError("the system has no namespaces")
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS if user == 0 else CLONE_NEWUSER | CLONE_NEWNS):
        raise MountError(f"unshare: {os.strerror(ctypes.get_errno())}")
    if user:  # root, in a namespace of its own
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", "--make-rprivate", "/")
