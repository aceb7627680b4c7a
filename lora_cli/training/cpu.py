"""Set up the process for training on a CPU (threads, memory allocator), and read its peak memory."""

import ctypes
import ctypes.util
import os
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
CACHED_KERNELS = 64  # compiled matrix products to keep; one batch has fewer shapes of products


def available_cores() -> int:
    """Return the number of cores that this process may use: fewer than all under Slurm, taskset or a cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_cpu(processes: int = 1) -> None:
    """Share the cores among the `processes` on this machine, and keep glibc from returning large blocks to the system.

    By default glibc maps and unmaps every tensor of more than 32 MiB, and trims its heap, so that each step has page
    faults for all its memory: about a sixth of a step's time on a small model. And oneDNN keeps 1,024 compiled products
    with their memory, one for each shape that any batch had: gigabytes that no later step needs.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's cache, and torch's above it
        os.environ.setdefault(name, str(CACHED_KERNELS))  # read at the first product, which has not happened yet
    torch.set_num_threads(max(1, available_cores() // processes))
    if sys.platform == "linux":
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    ru_maxrss would be that of the parent if the parent is larger: it is inherited over fork and exec. VmHWM belongs to
    the memory map, which exec replaces.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # the kernel prints kB, and means KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
