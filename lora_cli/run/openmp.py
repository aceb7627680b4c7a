"""Limit how long OpenMP's threads spin while they wait for each other. No torch: its library reads this when it loads.

A thread that has done its part of an operation spins until the others have done theirs, by default for milliseconds. On
a machine with other work these others are often not running, and the spinning takes the core that they need. Threads
that sleep at once lose time on an idle machine, where waking them takes longer than most operations. Measured on two
cores, tokens per second of a 135M model with 0, 1 and 2 other busy processes:

    rounds     idle    1    2
    300,000     344   98   35     the default of GNU's library
     10,000     350   71   77
      3,000     375  126    -
        100     216  151  206
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

# Rounds of the loop in which a thread of GNU's library spins, with which torch comes, and milliseconds of LLVM's and
# Intel's; then it sleeps.
IDLE = {"GOMP_SPINCOUNT": "3000"}
BUSY = {"GOMP_SPINCOUNT": "100", "KMP_BLOCKTIME": "0"}
BUSY_SHARE = 0.15  # of this process's cores that other processes use, from which on the machine counts as busy
# Settings of the user that say it already.
WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
STAT = Path("/proc/stat")


class CpuTimes(NamedTuple):
    """Times so far, in seconds."""

    all: float  # of the cores that this process may use
    idle: float  # of these, without work
    own: float  # that this process has computed


def read_cpu_times() -> CpuTimes | None:
    """Return the times so far; None where the system does not tell them."""
    if sys.platform != "linux":
        return None
    try:
        text = STAT.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    cores, tick = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK")
    total = idle = 0
    for line in text.splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            numbers = [int(value) for value in values[:8]]  # without the time of guests, which is part of user's
            total, idle = total + sum(numbers), idle + sum(numbers[3:5])
    own = os.times()
    return CpuTimes(total / tick, idle / tick, own.user + own.system)


def share_of_others(before: CpuTimes, after: CpuTimes) -> float:
    """Return the share of the cores' time that other processes, or other machines on the same cores, have used."""
    elapsed = after.all - before.all
    if elapsed <= 0:
        return 0.0
    busy = elapsed - (after.idle - before.idle) - (after.own - before.own)
    return max(0.0, busy / elapsed)


def limit_spinning(started: CpuTimes | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how long threads spin, unless the user has set it; before torch is imported.

    Args:
        started: times at the start of this process; the longer ago, the better is the measurement of other work.
        environment: of the process.
    """
    if any(name in environment for name in WAITING):
        return
    now = read_cpu_times()
    others = share_of_others(started, now) if started and now else 0.0
    environment.update(BUSY if others > BUSY_SHARE else IDLE)
