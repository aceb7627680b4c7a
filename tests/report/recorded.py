"""Run folders as training leaves them, written without training: any number of steps, any text, any state."""

import json
import math
from pathlib import Path
from typing import Any

ADAPTER = "ab" * 32  # SHA-256 of the weights, by the checksums of the adapter


def step_record(step: int, *, steps: int) -> dict[str, Any]:
    """Return the record of a step; its numbers have many digits, as real ones."""
    return {
        "step": step,
        "epoch": step / steps,
        "loss": 1.2 + 2 * math.exp(-5 * step / steps) + math.sin(step * 12.9898) / 10,
        "learning_rate": 2e-3 * (1 - step / steps),
        "grad_norm": 1 + math.cos(step * 78.233) / 3,
        "tokens": 500 + step % 12,
        "supervised": 200,
        "seconds": 0.5 + (step % 7) / 100,
        "peak_memory": 2**30 + step,
    }


def manifest(steps: int) -> dict[str, Any]:
    totals = {
        "rows": 90,
        "tokens": 4500,
        "supervised": 1800,
        "lengths": {"min": 10, "p50": 50, "p90": 80, "p99": 89, "max": 90},
        "histogram": {"first": 10, "width": 3, "rows": [1, 5, 20, 0, 4]},
    }
    source = {
        "source": "rows.jsonl", "split": "train", "format": "messages", "read": 100, "added": 0, "kept": 97,
        "dropped": {"longer than data.max_length": 3}, "held_out": 7, "rows": 90, "cut": 2,
    }  # fmt: skip
    return {
        "versions": {"python": "3.11.7", "lora-cli": "0.1.0"},
        "base": {"path": "base"},
        "machine": {"device": "cpu", "memory": 2**34},
        "command": ["train", "configs/small.yaml"],
        "recipe_file": "small.yaml",
        "steps": steps,
        "trainable_parameters": 1234567,
        "task": "causal-lm",
        "data_fingerprint": "f00d",
        "ledger": {"sources": [source], "train": totals, "eval": {**totals, "rows": 7}, "leaked": 0},
        "label_mask": [{"where": "rows.jsonl:1", "tokens": ["Who", " am", " I"], "loss": [[2, 3]], "left_out": 2}],
        "coverage": {
            "kinds": [{"kind": "q_proj", "matched": 4, "layers": 5, "parameters": 640, "experts": 0}],
            "notes": ["12 other trainable parameters"],
            "virtual_tokens": 0,
        },
    }


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    every: int = 10,
    finished: bool = True,
    learning_rate: float = 2e-3,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a run of `steps` steps with an evaluation after each `every` of them, and return its folder.

    Args:
        folder: of the run, which is created.
        steps: in the log; 0 for none.
        every: steps between evaluations; 0 for none.
        finished: whether it has an adapter, and its result in the manifest.
        learning_rate: in the recipe.
        changes: of the manifest.
    """
    folder.mkdir(parents=True)
    (folder / ".lora-lock").write_text("1\n")
    (folder / "recipe.yaml").write_text(
        f"model:\n  path: base\nadapter:\n  method: lora\n  rank: 4\ntraining:\n  learning_rate: {learning_rate}\n"
    )
    records: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.25, "eval_accuracy": 0.25}] if every else []
    for step in range(1, steps + 1):
        records.append(step_record(step, steps=steps))
        if every and step % every == 0:
            loss = 1.3 + (step / steps - 0.7) ** 2
            records.append({"step": step, "eval_loss": loss, "eval_accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = manifest(steps) | (changes or {})
    if finished:
        content["result"] = {"steps_done": steps, "adapter_step": steps, "stopped_early": False}
        (folder / "adapter").mkdir()
        files = {"adapter_model.safetensors": {"bytes": 1, "xxh3": "0", "sha256": ADAPTER}}
        record = {"tool": "lora-cli", "kind": "adapter", "files": files}
        (folder / "adapter" / "checksums.json").write_text(json.dumps(record))
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def evaluation(*, losses: list[float], adapter: str = ADAPTER, text: str = "Paris.") -> dict[str, Any]:
    """Return the JSON of `lora eval` over as many rows as `losses`, with one answer of base and adapter."""
    answers = {"base": {"text": f"{text} (base)", "finished": False}, "adapter": {"text": text, "finished": True}}
    return {
        "rows": len(losses),
        "data": "d1",
        "results": {
            "base": {"loss": 3.0, "accuracy": 0.2, "tokens": 90, "perplexity": 20.1},
            "adapter": {
                "loss": 1.5, "accuracy": 0.6, "tokens": 90, "perplexity": 4.5, "loss_95": [1.25, 1.75],
                "loss_below_base": {"value": 1.5, "low": 1.375, "high": 1.625},
            },
        },
        "adapters": {"adapter": adapter},
        "units_of_rows": [2] * len(losses),
        "losses_of_rows": {"base": [6.0] * len(losses), "adapter": losses},
        "answers": [{"where": "rows.jsonl:9", "prompt": "Where?", "references": ["Paris"], "answers": answers}],
    }  # fmt: skip
