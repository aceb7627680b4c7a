"""Compare `lora` with TRL and plain PEFT on this machine's CPU: the program behind scripts/bench.

Every way trains the demo model on the same rows, in a process of its own, in turn and several times; the medians are
compared. `of the limit` is the share of the rate at which this machine does only the matrix products of a step.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from lora_cli.run.openmp import limit_spinning, read_cpu_times
from tests.bench import run_scale
from tests.bench.cases import CASES, WAYS, Case
from tests.gpu.run_gpu import GIB, ROOT, Record, run_json, say

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT / "data" / "quickstart.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Measure as the command line says, and print the table."""
    options = _parse(arguments)
    if options.scale:
        return run_scale.run(options)
    limit_spinning(read_cpu_times())  # of the measuring processes, which import torch
    machine = run_json(["-m", "tests.bench.machine"], None)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    size = f"{machine['threads']} threads, {machine['memory'] / GIB:.0f} GiB"
    say(f"{machine['cpu']}, {size}, {machine['instructions']}; Python {platform.python_version()}, {versions}")
    say(f"{options.data.name}, {options.tokens} tokens in a batch, {options.steps} steps, {options.rounds} rounds\n")
    cases = [case for case in CASES if case.dtype in machine["dtypes"] and case.base in options.base]
    records = [record for case in cases for record in _measure(case, options)]
    say(table(records))
    if options.json:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "measured": records}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help="rows, in any format of `data.train`")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help="a .gguf file")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="of a batch (default 1024)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of a round; the first one is not counted")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each way, in turn (default 3)")
    parser.add_argument("--base", action="append", choices=["16-bit", "nf4"], help="default: both; may be repeated")
    parser.add_argument("--scale", action="store_true", help="one process on all cores against one on each, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    options = parser.parse_args(arguments)
    options.base = options.base or ["16-bit", "nf4"]
    for file in (options.data, options.model):
        if not file.is_file():
            parser.error(f"{file} is not there; scripts/quickstart makes the default rows and fetches the model")
    if options.steps < 2:
        parser.error("--steps: at least 2, because the first one is not counted")
    return options


def _measure(case: Case, options: argparse.Namespace) -> list[Record]:
    """Measure the limit and all ways of a case, in turn."""

    def measured(way: str) -> Record:
        say(f"measuring: {case.base} {case.dtype}, {way}")
        arguments = (*case, way, options.steps, options.model, options.data, options.tokens)
        return run_json(["-m", "tests.bench.measure_bench", *map(str, arguments)], None)

    rounds: dict[str, list[Record]] = {way: [] for way in ("limit", *WAYS)}
    for _ in range(options.rounds):
        for way, results in rounds.items():
            results.append(measured(way))
    limit = _middle(rounds.pop("limit"), max)
    start = {"base": case.base, "dtype": case.dtype}
    records = [{**start, "way": "products only", **limit}]
    for way, results in rounds.items():
        record = {**start, "way": WAYS[way], **_middle(results, median)}
        if "tokens_per_second" in record and "tokens_per_second" in limit:
            record["share_of_limit"] = record["tokens_per_second"] / limit["tokens_per_second"]
        records.append(record)
    return records


def _middle(results: list[Record], pick: Any) -> Record:
    """Return one record of several: the numbers that `pick` takes of all, or the first error."""
    failed = next((result for result in results if "error" in result), None)
    if failed:
        return failed
    return {
        key: pick([result[key] for result in results]) if isinstance(value, (int, float)) else value
        for key, value in results[-1].items()
    }


def table(records: list[Record]) -> str:
    """Return a line for each measurement; the first of each case is the limit, the second one is compared with."""
    lines = [
        "| base | dtype | way | tokens/s | of lora's | of the limit | GFLOP/s | peak memory | loss at the end |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lora: Record = {}
    for record in records:
        cells = [record["base"], record["dtype"], record["way"]]
        if "error" in record:
            lines.append(f"| {' | '.join(cells)} | {record['error']} | | | | | |")
            continue
        if record["way"] == WAYS["lora"]:
            lora = record
        rate, share, own = record["tokens_per_second"], record.get("share_of_limit"), lora.get("tokens_per_second")
        measured = "share_of_limit" in record
        cells += [f"{rate:,.0f}", f"{rate / own:.0%}" if measured and own else "", f"{share:.0%}" if share else ""]
        cells += [f"{record['operations_per_second'] / 1e9:,.0f}"]
        cells += [f"{record['peak_memory'] / GIB:.1f} GiB", f"{record['last_loss']:.4f}"] if measured else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
        if record["way"] == list(WAYS.values())[-1]:
            lora = {}
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
