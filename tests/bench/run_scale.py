"""Compare one process on all cores with several processes on one core each: scripts/bench --scale.

Every way is a run of `lora train` with the same tokens in a step, in turn and several times; the first step of a run is
not counted. The medians of the tokens per second are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from lora_cli.run.metrics_log import read_metrics
from lora_cli.training.cpu import available_cores
from tests.gpu.run_gpu import ROOT, say

STRATEGIES = ("ddp", "fsdp")


def run(options: argparse.Namespace) -> int:
    """Measure as the options of scripts/bench say, and print the table; return the exit code."""
    cores = available_cores()
    if cores < 2:
        say("--scale compares one process with several: this machine has one core")
        return 1
    ways = {"one process": (1, "auto"), **{f"{cores} processes, {name}": (cores, name) for name in STRATEGIES}}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, (processes, strategy) in ways.items():
                say(f"measuring: {way}")
                rates[way].append(
                    _measure(options, Path(folder) / f"{number}-{processes}-{strategy}", processes, strategy)
                )
    middle = {way: median(found) for way, found in rates.items()}
    lines = [f"| {cores} cores | tokens/s | of one process |", "|---|--:|--:|"]
    lines += [f"| {way} | {rate:,.0f} | {rate / middle['one process']:.0%} |" for way, rate in middle.items()]
    say("\n".join(lines))
    if options.json:
        options.json.write_text(
            json.dumps({"cores": cores, "tokens_per_second": rates}, indent=2) + "\n", encoding="utf-8"
        )
    return 0


def _measure(options: argparse.Namespace, output: Path, processes: int, strategy: str) -> float:
    """Train, and return the tokens per second of its steps but the first."""
    recipe: dict[str, Any] = {
        "model": {"path": str(options.model.resolve()), "dtype": "float32"},
        "adapter": {"rank": 16},
        "data": {"train": str(options.data.resolve()), "eval": None, "max_length": 512, "overlong": "drop"},
        "training": {
            "max_steps": options.steps,
            "tokens_per_batch": options.tokens,
            "tokens_per_step": options.tokens * available_cores(),
            "save_every": None,
        },
        "distributed": {"strategy": strategy, "processes": processes},
        "output": str(output),
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"lora train ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    steps = [record for record in read_metrics(output / "metrics.jsonl") if "loss" in record][1:]
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))
