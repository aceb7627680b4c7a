"""Set the process up for training on a CPU: its threads, and an allocator that keeps what it was given."""

import ctypes
import ctypes.util
import os
import resource
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
CACHED_KERNELS = 64  # more than one batch's products have shapes


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has under Slurm, taskset or a cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_cpu(processes: int = 1) -> None:
    """Share the cores among `processes` of this machine, and stop glibc from giving large blocks back.

    By default glibc maps and unmaps every tensor of more than 32 MiB, and trims its heap, so that each step
    faults all its pages in anew: about a sixth of a step's time on a small model. And oneDNN keeps 1,024 compiled
    products with their memory, one for each shape that a batch ever had: gigabytes that no step needs again.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's over it
        os.environ.setdefault(name, str(CACHED_KERNELS))  # read at the first product, which is still to come
    torch.set_num_threads(max(1, available_cores() // processes))
    if sys.platform == "linux":
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
