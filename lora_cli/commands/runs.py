"""`lora runs`: the runs in a folder with their state, losses, size and age; as a table, or as JSON."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from lora_cli.errors import LoraError
from lora_cli.report.recorded_run import Json, RunState, as_number, as_object, read_or_note, read_state
from lora_cli.report.tables import DASH, number
from lora_cli.run import console
from lora_cli.run.folder import PAGE, is_run
from lora_cli.run.metrics_log import read_metrics
from lora_cli.run.read_file import read_json_object
from lora_cli.run.run_lock import LOCK
from lora_cli.run.sparkline import sparkline
from lora_cli.training.checkpoint_folders import checkpoint_steps

MAX_DEPTH = 3  # folders between the given one and a run


class RunLine(NamedTuple):
    """One run of the list."""

    folder: Path
    state: RunState
    best: tuple[int, float] | None  # step and loss of the best evaluation after the start
    losses: list[float]  # of the training steps
    size: int  # bytes on the disk, earlier runs in it included
    changed: float  # seconds since 1970
    recipe: str | None  # name of its file
    problem: str | None  # what could not be read

    def to_json(self) -> dict[str, Any]:
        """Return the line as JSON."""
        best = {"step": self.best[0], "eval_loss": self.best[1]} if self.best else None
        return {
            "run": str(self.folder),
            "state": self.state.name,
            "step": self.state.step,
            "steps": self.state.total,
            "checkpoint": self.state.saved,
            "process": self.state.process,
            "error": self.state.error,
            "best": best,
            "last_loss": self.losses[-1] if self.losses else None,
            "bytes": self.size,
            "changed": self.changed,
            "recipe": self.recipe,
            "problem": self.problem,
        }


def runs(folder: Path) -> dict[str, Any]:
    """Print and return the runs in `folder` and up to MAX_DEPTH folders below it, the one that changed last at the end.

    Raises:
        LoraError: there is no such folder.
    """
    if os.path.isfile(folder):
        raise LoraError(f"{folder} is a file, not a folder", hint="name the folder of your runs: lora runs FOLDER")
    if not os.path.isdir(folder):
        raise LoraError(f"there is no folder {folder}", hint="name the folder of your runs: lora runs FOLDER")
    lines = sorted(map(_read_line, _find_runs(folder)), key=lambda line: line.changed)
    if lines:
        _print_table(lines)
    else:
        console.info(f"{folder} has no runs")
    return {"runs": [line.to_json() for line in lines]}


def _print_table(lines: Sequence[RunLine]) -> None:
    table = Table("run", "state", "best loss", "last loss", "", "size", "changed", "recipe", box=None)
    for line in lines:
        best = f"{number(line.best[1], '.4f')} at {line.best[0]:,}" if line.best else DASH
        last = number(line.losses[-1], ".4f") if line.losses else DASH
        curve = sparkline(line.losses) if console.out.encoding.startswith("utf") else ""
        state = line.state.describe()
        age = f"{describe_age(time.time() - line.changed)} ago"
        size = console.format_bytes(line.size)
        cells = (str(line.folder), state, best, last, curve, size, age, line.recipe or DASH)
        table.add_row(*cells)
    console.print_table(table)
    for line in lines:
        if line.state.error:
            console.info(f"{line.folder} failed: {line.state.error}")
        if line.problem:
            console.info(line.problem)


def _find_runs(folder: Path) -> Iterator[Path]:
    """Yield the runs in `folder` and below it, each once, though links name it too."""
    level, seen = [folder], set()
    for depth in range(MAX_DEPTH + 1):
        below = []
        for place in level:
            if (real := os.path.realpath(place)) in seen:
                continue
            seen.add(real)
            if _looks_like_run(place):
                yield place
            elif depth < MAX_DEPTH:
                below += _subfolders(place)
        level = below


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        console.info(f"{folder} cannot be read: {error.strerror}")
        return []
    # os.path.isdir, because entry.is_dir raises an exception for a loop of links.
    return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path)]


def _looks_like_run(folder: Path) -> bool:
    # A lock alone is what a run leaves that ended before its first step.
    return os.path.lexists(folder / LOCK) or is_run(folder)


def _read_line(folder: Path) -> RunLine:
    problems: list[str] = []
    nothing: list[Json] = []
    manifest: Json = {}
    records = read_or_note(lambda: read_metrics(folder / "metrics.jsonl"), nothing, problems)
    if os.path.lexists(folder / "manifest.json"):
        manifest = read_or_note(lambda: read_json_object(folder / "manifest.json"), manifest, problems)
    losses = [loss for record in records if (loss := as_number(record.get("loss"))) is not None]
    last = max((record["step"] for record in records if "loss" in record), default=0)
    size, changed = _size_and_time(folder)
    recipe = manifest.get("recipe_file")
    return RunLine(
        folder=folder,
        state=read_state(folder, manifest, last=last, checkpoints=checkpoint_steps(folder / "checkpoints")),
        best=_best(records, manifest),
        losses=losses,
        size=size,
        changed=changed,
        recipe=recipe if isinstance(recipe, str) else None,
        problem="; ".join(problems) or None,
    )


def _best(records: list[Json], manifest: Json) -> tuple[int, float] | None:
    """Return step and loss of the best evaluation; that before step 1 counts if training goes on from an adapter."""
    first = 0 if as_object(manifest).get("origins") else 1
    found = [(r["step"], float(r["eval_loss"])) for r in records if as_number(r.get("eval_loss")) is not None]
    return min((each for each in found if each[0] >= first), key=lambda each: each[1], default=None)


def _size_and_time(folder: Path) -> tuple[int, float]:
    """Return the bytes of all files in a folder, and the time of the newest one that the run itself writes."""
    made, size, newest = os.stat(folder).st_mtime, 0, 0.0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))
            except OSError:  # removed meanwhile, by the run
                continue
            size += found.st_size
            newest = max(newest, found.st_mtime if name not in (LOCK, PAGE) else 0.0)
    return size, newest or made


def describe_age(seconds: float) -> str:
    """Return a time that has passed in one unit: `5 min`, `3 h`, `12 days`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
