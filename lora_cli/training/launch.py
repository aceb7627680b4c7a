"""One process per GPU, through torch's elastic launcher, or part of a launch that somebody else made."""

import os
import sys

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DistributedSpec
from lora_cli.training.host import cores


def launched() -> bool:
    """Whether torchrun, `accelerate launch` or `spawn` below started this process as one of several."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def wanted_processes(spec: DistributedSpec) -> int:
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


def spawn(processes: int, arguments: list[str]) -> int:
    """Run `lora ARGUMENTS` in `processes` workers of this machine; returns the exit code of the first that failed."""
    command = ["--standalone", f"--nproc-per-node={processes}", "-m", "lora_cli", *arguments]
    # torchrun gives each worker one thread unless told otherwise; the workers set their own share.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as failed:
        first = min(failed.failures.values(), key=lambda failure: failure.timestamp)
        sys.stderr.write(f"process {first.local_rank} ended with exit code {first.exitcode}\n")
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0
