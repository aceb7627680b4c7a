"""Run tasks of the lm-evaluation-harness (lm_eval) on a model that is already loaded (extra: tasks)."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.hub import ask_hub
from lora_cli.run.read_file import read_bytes

MAX_TASK_BYTES = 1 << 20  # of the YAML file of a task


def check_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """Check the harness, its tasks and `folder` before any model is loaded.

    Args:
        tasks: names of tasks.
        folder: of further tasks, as YAML files.

    Raises:
        LoraError: the package lm-eval is not installed, `folder` does not exist or is not needed, or a task is unknown.
    """
    if not tasks:
        if folder is not None:
            raise LoraError("--tasks-dir: --tasks is missing", hint="add --tasks NAME")
        return
    if find_spec("lm_eval") is None:
        raise LoraError("--tasks needs the package lm-eval", hint='pip install "lora-cli[tasks]"')
    for file in sorted(folder.rglob("*.yaml")) if folder else ():
        read_bytes(file, limit=MAX_TASK_BYTES, hint="--tasks-dir: name a folder with YAML files of tasks")
    known = _task_manager(folder).all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise LoraError(
            f"--tasks {unknown[0]} is not a task of the harness",
            hint="for your own tasks, add --tasks-dir DIR; a task's name is `task:` in its YAML file",
        )


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    limit: int | None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Evaluate `model` with the harness and return every metric, by `task metric`.

    Args:
        model: a language model, with or without an adapter, whose attention supports padding masks.
        tokenizer: of the model.
        tasks: names of tasks in the harness.
        folder: of further tasks, as YAML files.
        limit: number of documents of each task; None for all.
        batch_size: documents in one batch.

    Raises:
        LoraError: the rows of a task are neither in the cache nor on a hub that answers.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    ask_hub(console.info)
    try:
        report = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=_task_manager(folder),
            limit=limit,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except ConnectionError as error:  # of datasets, also offline
        raise LoraError(
            f"--tasks: the rows of a task are not in the cache and cannot be downloaded: {str(error).splitlines()[0]}",
            hint="run it once with a network; then HF_HUB_OFFLINE=1 uses the cache",
        ) from None
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in report["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _task_manager(folder: Path | None) -> Any:
    return _index_tasks(folder.resolve() if folder else None)


@cache
def _index_tasks(folder: Path | None) -> Any:
    # Cached, because reading the thousands of task files of the harness takes seconds for each model.
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs each default that it uses
    return TaskManager(include_path=str(folder) if folder else None)
