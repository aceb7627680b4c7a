"""Compare runs of few and of many rows: encoding, start from the cache, batch planning, tokens per second and memory.

    python scripts/compare_row_counts.py --folder /tmp/rows                        1,000 and 1,000,000 rows
    python scripts/compare_row_counts.py --folder /tmp/rows --rows 1000 --rows 50000 --steps 4

The rows are synthetic instructions and answers of words from a fixed list, about as long as those of Alpaca: 20 and 65
words on average. Each measurement is a process of its own. The first one of each count encodes; the others, which are
taken in turn and whose medians are shown, find the rows in the cache. The model is that of scripts/quickstart, which
must have been run before, or --model. The files of rows are kept in the folder.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION, ANSWER = 20, 65  # mean words
TOKENS = 1024  # of a batch
WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "his"),
    *("model", "data", "train", "number", "answer", "question", "system", "language", "example", "value", "function"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", metavar="N", help="may be repeated")
    parser.add_argument("--folder", type=Path, required=True, help="for the rows and the cache")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--steps", type=int, default=8, help="of a measurement; the first one is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each count, in turn")
    parser.add_argument("--measure", type=int, metavar="N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    counts = sorted(set(arguments.rows or (1_000, 1_000_000)))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.folder / "cache", ignore_errors=True)
    write_rows(rows_file(arguments.folder, 1), 1)
    run(arguments, 1)  # unpacks the model, once
    for count in counts:
        if not rows_file(arguments.folder, count).is_file():
            write_rows(rows_file(arguments.folder, count), count)
        first = run(arguments, count)
        rate = count / first["encode"]
        print(f"{count:>9,} rows encoded in {first['encode']:.1f} s: {rate:,.0f} rows/s, {first['tokens']:,} tokens")
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(arguments.rounds):
        for count in counts:
            found[count].append(run(arguments, count))
    print("\n| rows | start: rows from the cache | batch plan | model | tokens/s | peak memory |")
    print("|--:|--:|--:|--:|--:|--:|")
    for count in counts:
        middle = {name: median(result[name] for result in found[count]) for name in found[count][0]}
        print(
            f"| {count:,} | {middle['encode']:.1f} s | {middle['plan']:.2f} s | {middle['model']:.1f} s "
            f"| {middle['rate']:.0f} | {middle['peak'] / 2**20:,.0f} MiB |"
        )


def rows_file(folder: Path, count: int) -> Path:
    return folder / f"instructions-{count}.jsonl"


def write_rows(path: Path, count: int) -> None:
    random_ = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(random_.choices(WORDS, k=1 + int(random_.expovariate(1 / mean))))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"instruction": f"{text(INSTRUCTION)} {number}", "output": text(ANSWER)}
            file.write(json.dumps(row) + "\n")


def run(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(count), "--folder", str(arguments.folder)]
    command += ["--model", str(arguments.model), "--steps", str(arguments.steps)]
    environment = {**os.environ, "LORA_CACHE": str(arguments.folder / "cache")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare rows and model as `lora train` does, and take the steps; return seconds, tokens per second and bytes."""
    import torch
    from accelerate import Accelerator

    from lora_cli.recipe.schema import Recipe
    from lora_cli.setup.inputs import batch_plan, load_inputs
    from lora_cli.setup.training_model import build_model
    from lora_cli.training.cpu import peak_memory, set_up_cpu
    from lora_cli.training.loop import fit
    from lora_cli.training.optimizer import make_optimizer

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    set_up_cpu()
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(arguments.model)},
            "adapter": {"rank": 16},
            "data": {
                "train": str(rows_file(arguments.folder, arguments.measure)),
                "eval": None,
                "max_length": TOKENS,
                "overlong": "truncate",
                "packing": True,
            },
            "training": {"max_steps": arguments.steps},
        }
    )
    times = [time.monotonic()]
    inputs = load_inputs(recipe, info=say)
    times.append(time.monotonic())
    plan = batch_plan(inputs.recipe, inputs, inputs.data.train, processes=1)
    times.append(time.monotonic())
    built = build_model(inputs.recipe, inputs, plan, total=arguments.steps, info=say)
    times.append(time.monotonic())
    spec, accelerator = recipe.training, Accelerator(cpu=True)
    optimizer = make_optimizer(built.model, spec)
    steps = list(fit(built.model, plan, spec=spec, optimizer=optimizer, accelerator=accelerator, total=arguments.steps))
    encode, planning, model = (b - a for a, b in pairwise(times))
    return {
        "encode": encode,
        "plan": planning,
        "model": model,
        "rate": sum(step.tokens for step in steps[1:]) / sum(step.seconds for step in steps[1:]),
        "tokens": inputs.data.ledger.train.tokens,
        "peak": peak_memory(torch.device("cpu")),
    }


if __name__ == "__main__":
    main()
