"""One process per GPU, through torch's elastic launcher, or part of a launch that somebody else made."""

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

SHUTDOWN_TIMEOUT_S = 3600  # seconds that workers have, after a signal, for the step in hand and its checkpoint
# The first process may write or unpack for long while the others wait. One that died ends the run without this: its
# peers find the connection closed, or the launcher ends them.
PROCESS_GROUP_TIMEOUT = timedelta(days=1)


def is_worker() -> bool:
    """Whether torchrun, `accelerate launch` or `spawn` below started this process as one of several."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes(*, cpu: bool) -> Accelerator:
    """Take this process's place among the others."""
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)])


def local_world_size(accelerator: Accelerator) -> int:
    """Processes on this machine, this one included: fewer than all where several machines share the run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Within the block, a peer that is gone is no bug of this process: why it went, it has said itself.

    Raises:
        LoraError: another process of the run has ended.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        if not any(lost in str(error) for lost in ("reset by peer", "closed by peer", "Broken pipe")):
            raise
        time.sleep(5)  # a launcher ends this process meanwhile, and names the one that went first
        raise LoraError("another process of this run has ended", hint="see its messages", exit_code=1) from None


def resolve_processes(spec: DistributedSpec) -> int:
    """Processes to start on this machine.

    Raises:
        LoraError: more than one process per GPU.
    """
    gpus = torch.cuda.device_count()
    if spec.processes == "auto":
        return max(1, gpus)
    if gpus and spec.processes > gpus:
        raise LoraError(
            f"distributed.processes: {spec.processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)}",
            hint=f"at most {gpus}, or auto",
        )
    return spec.processes


def launch_workers(processes: int, arguments: list[str]) -> int:
    """Run `lora ARGUMENTS` in `processes` workers of this machine; returns the exit code of the first that failed.

    A signal is passed on to the workers, which stop after the step in hand; then it is 130 or 143, as for one process.
    """
    # On a failure the launcher itself gives them 30 s: their peer is gone, and with it the step.
    options = ["--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}"]
    command = [*options, "-m", "lora_cli", *arguments]
    # torchrun gives each worker one thread unless told otherwise; the workers set their own share.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    _quiet_launcher()
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as failed:
        first = min(failed.failures.values(), key=lambda failure: failure.timestamp)
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # as a shell counts signals
        sys.stderr.write(f"process {first.local_rank} ended with exit code {code}\n")
        return code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _quiet_launcher() -> None:
    """What it logs of a failure says less than the process that failed did, and of a signal nothing to act on."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logger = logging.getLogger(name)  # levels are set on the loggers below, so only the way up can be cut
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
