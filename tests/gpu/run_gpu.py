"""Check the laws of tests/gpu on this machine's GPU and measure training on it: the program behind scripts/gpu."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.gpu.cases import SHAPES, WAYS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("tests") / "gpu"
ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*")  # of the last line of a traceback
STEPS = 10  # of a measurement; the first one is not counted
CPU_SHAPES = ("tiny",)
GPU_SHAPES = tuple(name for name in SHAPES if name not in CPU_SHAPES)
PARTS = ("laws", "speed")
GIB = 1 << 30
Record = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Check and measure as the command line says; return 1 if a law failed, else 0."""
    options = _parse(arguments)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    machine = run_json(["-m", "tests.gpu.machine"], until)
    if "error" in machine:
        say(f"this machine cannot be described: {machine['error']}")
        return 1
    report: Record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "laws": [], "speed": []}
    say(describe_machine(machine))
    if options.only in (None, "laws"):
        report["laws"] = check_laws(until)
        say(law_table(report["laws"]))
    if options.only in (None, "speed"):
        report["speed"] = list(_measure_all(options, machine, until))
        say(speed_table(report["speed"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        say(f"written: {options.json}")
    return int(any(law["failed"] for law in report["laws"]))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="the laws or the measurements alone")
    parser.add_argument(
        "--shape", action="append", choices=[*SHAPES], metavar="NAME",
        help=f"of {', '.join(SHAPES)}; may be repeated; default: all but tiny on a GPU, tiny without",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each measurement (default {STEPS})")
    parser.add_argument("--minutes", type=float, metavar="N", help="time limit; what is left then is left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps: at least 2, because the first one is not counted")
    return options


def describe_machine(machine: Record) -> str:
    """Return the lines on GPU, versions and what is missing."""
    device, rate = machine["device"], machine["product_rate"]
    name = device["name"]
    if device["type"] == "cuda":
        name += (
            f", {device['memory'] / GIB:.0f} GiB, compute capability {device['capability']}, driver {device['driver']}"
        )
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
    product = f"{rate['operations_per_second'] / 1e12:.2f} TFLOP/s in products of {rate['size']} x {rate['size']}"
    return "\n".join([name, versions, f"{product}, {rate['dtype']}", *(f"lacks: {line}" for line in machine["lacks"])])


def check_laws(until: float | None) -> list[Record]:
    """Run the tests of this folder, and return passed, failed and skipped of each function, with its failures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", f"--junitxml={file}"]
        process = _run([*command, str(FOLDER)], until, stdout=sys.stderr)
        if process is None or not file.is_file():
            why = "no time was left" if process is None else f"pytest ended with exit code {process.returncode}"
            return [{"law": "all laws", "passed": 0, "failed": 1, "skipped": 0, "messages": [why]}]
        return count_cases(ElementTree.parse(file).getroot())


def count_cases(results: ElementTree.Element) -> list[Record]:
    """Return the record of each test function in pytest's XML; its name is the law in words."""
    laws: dict[str, Record] = {}
    for case in results.iter("testcase"):
        name, _, values = case.get("name", "").partition("[")
        words = name.removeprefix("test_").replace("_", " ")
        law = laws.setdefault(words, {"law": words, "passed": 0, "failed": 0, "skipped": 0, "messages": []})
        skipped = case.find("skipped")
        found = next((each for kind in ("failure", "error") if (each := case.find(kind)) is not None), skipped)
        law["passed" if found is None else "skipped" if found is skipped else "failed"] += 1
        message = "" if found is None else found.get("message", "").splitlines()[0]
        if found is not None and found is not skipped:
            message = f"[{values}: {message}" if values else message
        if message and message not in law["messages"]:
            law["messages"].append(message)
    return list(laws.values())


def law_table(laws: list[Record]) -> str:
    """Return a line for each law, with the reasons of failed and skipped cases below it."""
    width = max(len(law["law"]) for law in laws)
    lines = [f"\n{'law':{width}} passed failed skipped"]
    for law in laws:
        lines.append(f"{law['law']:{width}} {law['passed']:6} {law['failed']:6} {law['skipped']:7}")
        lines += [f"    {message}" for message in law["messages"]]
    return "\n".join(lines)


def _measure_all(options: argparse.Namespace, machine: Record, until: float | None) -> Iterator[Record]:
    """Measure every way on every shape, in turn, each in its own process."""
    on_gpu = machine["device"]["type"] == "cuda"
    for shape in options.shape or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        for base in SHAPES[shape].bases:
            for way, (title, on_cpu) in WAYS.items():
                record = {"shape": shape, "base": base, "way": title}
                if way.startswith("trl") and not machine["versions"]["trl"]:
                    record["error"] = "left out: trl is not installed"
                elif not on_gpu and not on_cpu:
                    record["error"] = "left out: needs a GPU"
                else:
                    say(f"measuring: {shape} {base}, {title}")
                    record |= run_json(["-m", "tests.gpu.measure", shape, base, way, str(options.steps)], until)
                if on_gpu and "operations_per_second" in record:
                    rate = machine["product_rate"]["operations_per_second"]
                    record["share_of_product_rate"] = record["operations_per_second"] / rate
                yield record


def speed_table(records: list[Record]) -> str:
    """Return a line for each measurement: what it gave, or why it gave nothing."""
    width = max(len(record["way"]) for record in records)
    lines = [f"\n{'shape':10} {'base':6} {'way':{width}} {'tokens/s':>9} {'of product':>10} {'peak GiB':>8}"]
    for record in records:
        start = f"{record['shape']:10} {record['base']:6} {record['way']:{width}}"
        if "error" in record:
            lines.append(f"{start} {record['error']}")
            continue
        share = record.get("share_of_product_rate")
        of_product = "-" if share is None else f"{share:.1%}"
        peak = record["peak_memory"] / GIB
        lines.append(f"{start} {record['tokens_per_second']:9.0f} {of_product:>10} {peak:8.2f} {record['how']}")
    return "\n".join(lines)


def run_json(arguments: list[str], until: float | None) -> Record:
    """Run Python with `arguments`, and return the JSON of the last line it prints; `error` says why there is none."""
    process = _run(arguments, until, stdout=subprocess.PIPE)
    if process is None:
        return {"error": "left out: no time was left"}
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if ERROR.match(line)]
        return {"error": errors[-1] if errors else f"ended with exit code {process.returncode}"}
    found: Record = json.loads(process.stdout.splitlines()[-1])
    return found


def _run(arguments: list[str], until: float | None, *, stdout: Any) -> subprocess.CompletedProcess[str] | None:
    """Run Python with `arguments` until the time is over; None if it is."""
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        return None
    stderr = subprocess.PIPE if stdout is subprocess.PIPE else None
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=stdout, stderr=stderr, text=True, check=False, timeout=left,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
