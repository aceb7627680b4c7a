"""Tasks of the lm-evaluation-harness, on a model that is loaded already (extra: tasks)."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError


def check_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """Refuse what is not there, before any model is loaded.

    Raises:
        LoraError: the package, the folder of tasks, or a task of that name.
    """
    if not tasks:
        if folder is not None:
            raise LoraError("--tasks-dir: no task is named", hint="add --tasks NAME")
        return
    if find_spec("lm_eval") is None:
        raise LoraError("--tasks needs the package lm-eval", hint='pip install "lora-cli[tasks]"')
    if folder is not None and not folder.is_dir():
        raise LoraError(f"--tasks-dir {folder}: there is no such folder", hint="name one with YAML files of tasks")
    known = _task_manager(folder).all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise LoraError(
            f"--tasks {unknown[0]} is not known to the harness",
            hint="tasks of your own are found with --tasks-dir DIR, by the `task:` in their YAML",
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
    """Every metric of `tasks`, as `task metric`, by the harness's own arithmetic.

    Args:
        model: a language model, with or without an adapter, whose attention transformers makes masks for.
        tokenizer: its tokenizer.
        tasks: by their names in the harness.
        folder: of further tasks, as YAML files.
        limit: documents of each task; None for all.
        batch_size: documents at once.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=_task_manager(folder),
        limit=limit,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _task_manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of defaults that it takes
    return TaskManager(include_path=str(folder) if folder else None, verbosity="ERROR")
