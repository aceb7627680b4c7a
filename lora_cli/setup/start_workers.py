"""Start the worker processes of a training run on this machine, after errors in recipe, data or model were reported."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.folder import open_run
from lora_cli.run.worker import is_worker
from lora_cli.setup.inputs import load_inputs, with_recorded_date
from lora_cli.setup.resume import find_run_state
from lora_cli.setup.training_model import check_before_rows
from lora_cli.training import launch, process_group
from lora_cli.training.peers import Peers

MAX_RESTARTS = "--max-restarts"  # option of the command line that is not passed on


class StartRequest(NamedTuple):
    """How the command line starts a training run."""

    resume: bool  # continue from the newest checkpoint
    fresh: bool  # move an existing run aside, and start again
    arguments: list[str]  # of the command line, passed on to the workers
    max_restarts: int = 0  # how often the workers are started again after one has died


def start_workers(recipe: Recipe, request: StartRequest) -> int | None:
    """Run the command in worker processes; return its exit code, or None if this process is to train by itself.

    Raises:
        LoraError: recipe, rows and model do not fit, the run folder cannot be used, or this is a worker of torchrun,
            which alone could start the workers of all machines again.
    """
    if is_worker():
        if request.max_restarts:
            raise LoraError(
                f"{MAX_RESTARTS}: these processes are started by another program than lora",
                hint="give the option to that one: torchrun --max-restarts N, accelerate launch --max_restarts N",
            )
        return None
    processes = launch.resolve_processes(recipe.distributed)
    if process_group.SUPERVISED in os.environ or (processes == 1 and not request.max_restarts):
        return None
    check_before_rows(recipe)
    resume, arguments = request.resume, _without_restarts(request.arguments)
    # Errors in recipe, data or model are reported here, once, and not by every process.
    with open_run(recipe.output, resume=resume, fresh=request.fresh):
        if resume:
            find_run_state(recipe, info=console.info)
        inputs = load_inputs(with_recorded_date(recipe) if resume else recipe, info=console.info)
    if inputs.template_date and recipe.data.template_date is None:
        # All processes write the same date, also if they start at midnight.
        arguments = [*arguments, "--set", f"data.template_date={inputs.template_date}"]
    if processes > 1:
        console.info(f"starting {processes} processes")
    earlier = _records(recipe.output)

    def resume_arguments() -> list[str]:
        if resume or _records(recipe.output) in (None, earlier):  # not begun: --fresh has moved nothing aside yet
            return arguments
        return [*(argument for argument in arguments if argument != "--fresh"), "--resume"]

    return launch.launch_with_restarts(
        processes, arguments, max_restarts=request.max_restarts, resume_arguments=resume_arguments
    )


def resumes_after_restart(peers: Peers | None) -> bool:
    """Return whether torchrun has started the workers again, after they had begun the run.

    A run that was in the folder before torchrun started is not continued unasked. All processes must call it.
    """
    return peers is not None and bool(peers.exchange("resumes", peers.has_begun())[0])


def _records(output: str) -> tuple[int, int] | None:
    """Return what identifies the file of the run's recipe: each start of the run writes it anew, before step 1."""
    with suppress(FileNotFoundError):
        found = os.stat(Path(output) / "recipe.yaml")
        return found.st_ino, found.st_mtime_ns
    return None


def _without_restarts(arguments: list[str]) -> list[str]:
    """Return the arguments without `--max-restarts N`: a worker starts nothing again."""
    kept = [argument for argument in arguments if not argument.startswith(f"{MAX_RESTARTS}=")]
    if MAX_RESTARTS in kept:
        at = kept.index(MAX_RESTARTS)
        kept[at : at + 2] = []
    return kept
