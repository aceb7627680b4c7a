"""The summary of a run for `lora train --json`, read from the files of its folder. No torch."""

from pathlib import Path
from typing import Any

from lora_cli.run.metrics_log import read_metrics
from lora_cli.run.read_file import read_json_object


def summarize_run(folder: Path, *, exit_code: int) -> dict[str, Any]:
    """Return what a run has done, as JSON.

    Args:
        folder: of the run; one that failed early has no files, or those of an earlier start.
        exit_code: 0 done, 130 or 143 stopped by a signal, 1 or 2 failed: its processes have printed why.

    Raises:
        LoraError: a file of the run is damaged.
    """
    stopped = exit_code > 128
    record: dict[str, Any] = {"run": folder, "exit_code": exit_code, "finished": exit_code == 0, "stopped": stopped}
    if exit_code and not stopped:
        hint = "lora train RECIPE --resume goes on from the newest checkpoint"
        return {"error": "the training failed; its processes have printed why on stderr", "hint": hint, **record}
    if stopped and not (folder / "manifest.json").exists():  # before the first step
        return {**record, "steps_done": 0}
    manifest = read_json_object(folder / "manifest.json")
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [each for each in metrics if "loss" in each]
    evaluations = [each for each in metrics if "eval_loss" in each]
    return {
        **record,
        "adapter": folder / "adapter" if exit_code == 0 else None,
        "steps": manifest["steps"],
        "steps_done": steps[-1]["step"] if steps else 0,
        "trainable_parameters": manifest["trainable_parameters"],
        "tokens": sum(each["tokens"] for each in steps),
        "supervised_tokens": sum(each["supervised"] for each in steps),
        "seconds_of_steps": sum(each["seconds"] for each in steps),
        "last_step": steps[-1] if steps else None,
        "evaluations": evaluations,
        "result": manifest.get("result"),
        "ledger": manifest["ledger"],
    }
