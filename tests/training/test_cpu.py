"""Set-up of a CPU process: its peak memory is its own, not that of the process which started it."""

import subprocess
import sys

import pytest
import torch

from lora_cli.training import cpu

pytestmark = pytest.mark.slow

OWN_PEAK = "from lora_cli.training.cpu import peak_resident_memory; print(peak_resident_memory())"
LARGE = 1 << 30  # bytes


def peak_of_a_child() -> int:
    return int(subprocess.run([sys.executable, "-c", OWN_PEAK], capture_output=True, text=True, check=True).stdout)


def test_peak_memory_is_not_that_of_a_large_parent():
    """ru_maxrss is inherited over fork and exec; a figure from it would be larger than this whole parent."""
    small = peak_of_a_child()
    block = torch.ones(LARGE, dtype=torch.uint8)
    assert cpu.peak_resident_memory() > LARGE
    assert peak_of_a_child() < small + LARGE // 8
    del block


def test_peak_memory_counts_what_was_freed():
    before = cpu.peak_resident_memory()
    block = torch.ones(max(before, LARGE) + (64 << 20), dtype=torch.uint8)
    del block
    assert cpu.peak_memory(torch.device("cpu")) > before
