"""Distributed launch (DDP): start one worker per GPU with torchrun's launcher, or join the workers of another one."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DistributedSpec
from lora_cli.training.cpu import available_cores

SHUTDOWN_TIMEOUT_S = 3600  # seconds that workers have after a signal to finish the current step and its checkpoint
# Long, because the first process may write or unpack files for hours while the others wait. A process that dies is
# noticed without this timeout: its peers get a closed connection, or the launcher ends them.
PROCESS_GROUP_TIMEOUT = timedelta(days=1)


def is_worker() -> bool:
    """Return whether torchrun, `accelerate launch` or `launch_workers` started this process as a worker."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes(*, cpu: bool) -> Accelerator:
    """Join the process group and return the Accelerator of this process."""
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)])


def local_world_size(accelerator: Accelerator) -> int:
    """Return the number of processes on this machine, which is less than the world size of a multi-machine run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Within the block, report a lost peer as an error without traceback: the peer has printed its own reason.

    Raises:
        LoraError: another process of the run has ended.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no exception class of its own
        if not any(text in str(error) for text in ("reset by peer", "closed by peer", "Broken pipe")):
            raise
        time.sleep(5)  # a launcher ends this process in this time and names the process that failed first
        raise LoraError("another process of this run has ended", hint="see its messages", exit_code=1) from None


def resolve_processes(spec: DistributedSpec) -> int:
    """Return the number of processes to start on this machine.

    Raises:
        LoraError: `distributed.processes` is more than the number of GPUs.
    """
    gpus = torch.cuda.device_count()
    if spec.processes == "auto":
        return max(1, gpus)
    if gpus and spec.processes > gpus:
        raise LoraError(
            f"distributed.processes: {spec.processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)}",
            hint=f"write at most {gpus}, or auto",
        )
    return spec.processes


def launch_workers(processes: int, arguments: list[str]) -> int:
    """Run `lora ARGUMENTS` in `processes` workers on this machine.

    A signal is passed on to the workers, which stop after the current step.

    Returns:
        0, the exit code of the first worker that failed, or 130 (SIGINT) or 143 (SIGTERM) as for a single process.
    """
    # The timeout is for signals only. If a worker fails, the launcher ends the others after 30 s: without their peer
    # they cannot finish the step.
    options = ["--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}"]
    command = [*options, "-m", "lora_cli", *arguments]
    # torchrun sets one thread per worker if this is not set; the workers then set their own number.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    _silence_launcher()
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # 128 + signal, as in a shell
        sys.stderr.write(f"process {first.local_rank} ended with exit code {code}\n")
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _silence_launcher() -> None:
    """Drop the launcher's log: the failed process has printed more than it, and its lines on signals do not help."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        # Setting a level here has no effect, because the child loggers have their own: stop the propagation instead.
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
