"""Whether this process is one of several of a run, by the environment variables that its launcher has set. No torch."""

import os
import threading
from typing import NamedTuple

from lora_cli.errors import LoraError

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables of a worker
OF_MACHINE = "LOCAL_WORLD_SIZE"  # environment variable of a worker: processes on its machine
# Set by MPI and by srun with PMI: Accelerate takes a process that has one for a worker.
OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
STARTERS = "start it with torchrun or accelerate launch, or let `lora train` start the processes of one machine"
LAST_PORT = 65535
joined = threading.Event()  # this process has joined a process group, whose threads can outlast the run


class _Range(NamedTuple):
    """The values that a variable can have."""

    least: int
    most: int | None  # None: there is no such limit
    why: str = ""  # the limit is what it is


def is_worker() -> bool:
    """Return whether torchrun, `accelerate launch` or `launch_workers` started this process as a worker of a group.

    Raises:
        LoraError: some environment variables of a worker of several are set, but not all, or one has a value that it
            cannot have.
    """
    size, missing = os.environ.get("WORLD_SIZE"), [name for name in RENDEZVOUS if not os.environ.get(name)]
    if not size:
        _check_alone()
        return False
    # Platforms set WORLD_SIZE, RANK and an address, but no LOCAL_RANK, for containers that start the processes.
    if size == "1" and "LOCAL_RANK" in missing:
        return False
    if missing:
        raise LoraError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            hint=f"{STARTERS}; if this is one process alone, unset WORLD_SIZE",
        )
    if (name := next(filter(_is_wrong, _ranges()), None)) is not None:
        least, most, why = _ranges()[name]
        raise LoraError(
            f"{name} is {os.environ[name]}, and can be {f'{least} or more' if most is None else f'{least} to {most}'}"
            f"{why}",
            hint="torchrun and accelerate launch set it; RANK counts the processes of the run from 0, and LOCAL_RANK "
            "those of each machine",
        )
    return True


def local_rank() -> int:
    """Return the number of this process among those of its machine; 0 for one alone (Accelerate writes -1)."""
    return max(0, _number("LOCAL_RANK") or 0)


def processes_of_machine(processes: int) -> int:
    """Return the number of processes on this machine, which is less than all `processes` of a multi-machine run."""
    return min(processes, max(0, _number(OF_MACHINE) or 0) or processes)


def is_first_of_machine() -> bool:
    """Return whether this process prints what all processes of its machine would print."""
    return _is_first("LOCAL_RANK")


def is_first_of_run() -> bool:
    """Return whether this process is the one of its run that writes."""
    return _is_first("RANK")


def _is_first(name: str) -> bool:
    if os.environ.get(name, "") in ("", "0") or not os.environ.get("WORLD_SIZE"):
        return True
    # A process that does not know its place speaks for itself: the first one may wait for it.
    return _is_wrong("RANK") or _is_wrong("LOCAL_RANK")


def _check_alone() -> None:
    """Raise a LoraError if a process without WORLD_SIZE looks like one of several: Accelerate would look for them."""
    several = {name: value for name in OF_MPI if (value := os.environ.get(name, "")) not in ("", "0", "1")}
    of_several = {name: value for name in ("LOCAL_RANK",) if (value := os.environ.get(name, "")) not in ("", "-1")}
    for name, value in (several | of_several).items():
        raise LoraError(
            f"{name} is {value}, as in one of several processes, but WORLD_SIZE is not set",
            hint=f"{STARTERS}; if this is one process alone, unset {name}",
        )


def _ranges() -> dict[str, _Range]:
    """Return the values that the variables of this worker can have, those on which others depend first."""
    size = _number("WORLD_SIZE") or 0
    here = _number(OF_MACHINE) or size
    ranges = {"WORLD_SIZE": _Range(1, None)}
    if os.environ.get(OF_MACHINE):
        ranges[OF_MACHINE] = _Range(1, size, f", as WORLD_SIZE is {size}")
    return ranges | {
        "RANK": _Range(0, size - 1, f", as WORLD_SIZE is {size}"),
        "LOCAL_RANK": _Range(0, here - 1, f", as this machine has {here} processes"),
        "MASTER_PORT": _Range(1, LAST_PORT),
    }


def _is_wrong(name: str) -> bool:
    number, (least, most, _) = _number(name), _ranges()[name]
    return number is None or number < least or (most is not None and number > most)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() else None
