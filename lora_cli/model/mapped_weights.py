"""Weights that transformers left in memory-mapped files: copied, so that no change of a file reaches a running process.

On the CPU, weights that keep their dtype stay views of the safetensors file. If another program cuts the file off, the
kernel ends the process (SIGBUS); if it writes other weights over it, the model changes without an error.
"""

import bisect
import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor, nn

MAPS = Path("/proc/self/maps")  # of Linux; elsewhere nothing is copied
PAGE = os.sysconf("SC_PAGESIZE")  # bytes
MADV_DONTNEED = 4  # Linux: the pages are not needed any more


@torch.no_grad()
def copy_mapped_weights(model: nn.Module) -> None:
    """Copy all parameters and buffers that are views of files; in place, one tensor after the other.

    The pages of the file are given back after each tensor, so that the weights are in memory only once.
    """
    if not MAPS.is_file():
        return
    ranges = _file_ranges()
    starts = [start for start, _ in ranges]
    for tensor in (*model.parameters(), *model.buffers()):
        position = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        if tensor.device.type == "cpu" and position >= 0 and tensor.data_ptr() < ranges[position][1]:
            mapped = tensor.data
            tensor.data = _copy(mapped)
            _release_pages(mapped)


def _file_ranges() -> list[tuple[int, int]]:
    """Return start and end of the addresses that are mapped to files, sorted.

    All files, because those of a hub model have no ending: their names are hashes.
    """
    ranges = []
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/"):
            start, end = addresses.split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def _copy(mapped: Tensor) -> Tensor:
    """Return a copy that starts at the same place of a page: kernels add in an order that depends on the alignment."""
    if not mapped.is_contiguous() or mapped.data_ptr() % mapped.itemsize:
        return mapped.clone()
    buffer = torch.empty(mapped.nbytes + PAGE, dtype=torch.uint8)
    start = (mapped.data_ptr() - buffer.data_ptr()) % PAGE
    copy = buffer[start : start + mapped.nbytes].view(mapped.dtype).view(mapped.shape)
    return copy.copy_(mapped)


def _release_pages(mapped: Tensor) -> None:
    """Remove the whole pages of a tensor from memory; the file has their contents."""
    start = -(-mapped.data_ptr() // PAGE) * PAGE
    end = (mapped.data_ptr() + mapped.nbytes) // PAGE * PAGE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
