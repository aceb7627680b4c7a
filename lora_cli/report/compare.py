"""Several runs side by side: the keys in which their recipes differ, and a table of their final figures. No torch."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_cli.report.recorded_run import Json, RecordedRun, as_number, as_object
from lora_cli.report.tables import DASH, Table, interval, number
from lora_cli.run.console import format_duration

MIN_ROWS = 5  # fewer rows give no meaningful interval
Interval = tuple[float, float, float]  # value, low and high


class RowLossIntervals(NamedTuple):
    """95% intervals from the losses of held-out rows, and where these are from."""

    loss: Interval
    rows: int
    source: str  # a file of `lora eval`, or a checkpoint
    versus_first: Interval | None  # loss of the first run minus this one, paired by row; None: other rows, or the first


def recipe_differences(runs: Sequence[RecordedRun]) -> Table | None:
    """Return the keys of the recipes whose values differ; None if fewer than two runs have a recipe."""
    flat = {run.name: _flatten(run.recipe) for run in runs if run.recipe}
    if len(flat) < 2:
        return None
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows, equal = [], 0
    for key in keys:
        values = [_text(flat[run.name][key]) if key in flat.get(run.name, {}) else DASH for run in runs]
        if len({value for run, value in zip(runs, values, strict=True) if run.name in flat}) > 1:
            rows.append((key, *values))
        else:
            equal += 1
    header = ("key", *(run.name for run in runs))
    return Table("Keys of the recipes that differ", header, rows, notes=[f"{equal:,} other keys are equal"])


def _flatten(tree: Json, prefix: str = "") -> Json:
    """Return the values of a recipe by dotted key; lists stay whole."""
    flat: Json = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def final_table(runs: Sequence[RecordedRun], intervals: Mapping[str, RowLossIntervals]) -> Table:
    """Return the final figures of each run; `intervals` are by the run's name, as far as rows' losses are recorded."""
    rows = []
    for run in runs:
        best, found = run.best, intervals.get(run.name)
        start = next((each for each in run.evaluations if each["step"] == 0), None)
        versus = found.versus_first if found else None
        seconds = [s for record in run.steps if (s := as_number(record.get("seconds"))) is not None]
        tokens = [t for record in run.steps if (t := as_number(record.get("tokens"))) is not None]
        rows.append(
            (
                run.name,
                run.state.describe(),
                number(start["eval_loss"], ".4f") if start else DASH,
                f"{number(best['eval_loss'], '.4f')} at step {best['step']:,}" if best else DASH,
                number(written_loss(run), ".4f"),
                interval(list(found.loss[1:])) if found else DASH,
                f"{found.rows:,}, {found.source}" if found else DASH,
                f"{number(versus[0], '+.4f')} ({interval(list(versus[1:]))})" if versus else DASH,
                number(run.steps[-1].get("loss") if run.steps else None, ".4f"),
                number(sum(tokens), ",.0f") if tokens else DASH,
                format_duration(sum(seconds)) if seconds else DASH,
            )
        )
    header = (
        "run", "state", "loss at the start", "best loss", "loss of the written adapter", "95% interval",
        "its rows", f"below {runs[0].name}, paired", "last training loss", "tokens", "time of all steps",
    )  # fmt: skip
    units = " or ".join(sorted({run.loss_unit for run in runs}))
    notes = [f"losses of held-out rows but for the last training loss; {units}"]
    for run in runs:
        if run.name not in intervals:
            is_measured = any(each.of_adapter for each in run.measurements)
            how = f": {run.eval_command}" if run.eval_command and not is_measured else ""
            notes.append(f"{run.name}: no interval, because no losses of at least {MIN_ROWS} rows are recorded{how}")
    fingerprints = {as_object(run.manifest).get("data_fingerprint") for run in runs}
    if len(fingerprints) > 1:
        notes.append("the runs have different rows: their losses are comparable only if the held-out rows are the same")
    return Table("Final figures", header, rows, 2, notes)


def written_loss(run: RecordedRun) -> float | None:
    """Return the held-out loss at the step of the written adapter; None if there is none."""
    losses = [each["eval_loss"] for each in run.evaluations if each["step"] == run.adapter_step]
    return as_number(losses[-1]) if losses else None
