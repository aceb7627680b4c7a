"""The report of `lora eval`: a table of all models, confidence intervals, and the same figures as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lora_cli.evaluation import bootstrap
from lora_cli.evaluation.bootstrap import Interval
from lora_cli.evaluation.generation import Answer
from lora_cli.evaluation.likelihood import RowLikelihoods
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.tasks import TaskName
from lora_cli.run.folder import BASE

MIN_ROWS = 5  # fewer rows give no meaningful interval


class ModelResult(NamedTuple):
    """The measurements of one model."""

    rows: RowLikelihoods
    metrics: dict[str, float]  # of a classifier, by name
    answers: Sequence[Answer] = ()  # to the prompts
    tasks: Mapping[str, float] = {}  # of the lm-evaluation-harness, by task and metric


def results_table(results: Mapping[str, ModelResult], task: TaskName) -> Table:
    """Return a table with a line for each model: loss, and the perplexity, accuracy and metrics of the task."""
    first = next(iter(results.values()))
    likelihood = first.rows.overall
    columns = ["mse" if likelihood.accuracy is None else "loss"]
    language_model = not TASKS[task].is_classification
    if language_model:
        columns.append("perplexity")
    if likelihood.accuracy is not None:
        columns.append("token accuracy" if language_model else "accuracy")
    table = Table("", *columns, *first.metrics, f"{TASKS[task].unit}s", box=None)
    for name, result in results.items():
        likelihood = result.rows.overall
        cells = [f"{likelihood.loss:.4f}"]
        if language_model:
            cells.append(f"{likelihood.perplexity:.2f}")
        if likelihood.accuracy is not None:
            cells.append(f"{likelihood.accuracy:.1%}")
        values = (f"{value:.4f}" for value in result.metrics.values())
        table.add_row(name, *cells, *values, f"{likelihood.tokens:,}")
    return table


def interval_lines(results: Mapping[str, ModelResult], task: TaskName) -> list[str]:
    """Return lines with the confidence intervals of each loss and of its difference from the base, paired by row."""
    base = results[BASE].rows
    if len(base.units) < MIN_ROWS:
        return [f"no confidence intervals: they need at least {MIN_ROWS} rows"]
    if base.units.sum() == 0:
        return []
    lines = [f"95% bootstrap confidence intervals ({len(base.units):,} rows):"]
    for name, result in results.items():
        loss = bootstrap.mean_interval(result.rows.loss, base.units)
        line = f"  {name}: loss {loss.low:.4f} to {loss.high:.4f}"
        if name != BASE:
            below_base = bootstrap.difference_interval(result.rows.loss, base.loss, base.units)
            line += f"; versus the base: loss {_verdict(below_base, '.4f')}"
            if base.has_accuracy:
                metric = "accuracy" if TASKS[task].is_classification else "token accuracy"
                points = bootstrap.difference_interval(base.correct * 100, result.rows.correct * 100, base.units)
                line += f", {metric} {_verdict(points, '.1f', ' points')}"
        lines.append(line)
    return lines


def describe_loss_difference(first: NDArray[np.float64], second: NDArray[np.float64], units: NDArray[np.int64]) -> str:
    """Return whether the losses of `first` are better than those of `second`, with the paired 95% interval.

    Args:
        first: [rows] fp64, sums over the units of each row.
        second: [rows] fp64, the same of the other model, on the same rows.
        units: [rows] int64, the number of units of each row.
    """
    if len(units) < MIN_ROWS:
        difference = float((second - first).sum() / units.sum())
        verb = "better" if difference > 0 else "worse"
        return f"{verb} by {abs(difference):.4f}, but {len(units)} rows are too few to tell this from chance"
    verdict = _verdict(bootstrap.difference_interval(first, second, units), ".4f")
    return f"{verdict} (95% interval over {len(units):,} rows, paired)"


def _verdict(improvement: Interval, digits: str, unit: str = "") -> str:
    half = f"± {improvement.half_width:{digits}}{unit}"
    if improvement.low <= 0 <= improvement.high:
        return f"not significantly different ({improvement.value:+{digits}} {half})"
    return f"{'better' if improvement.low > 0 else 'worse'} by {abs(improvement.value):{digits}} {half}"


def result_record(result: ModelResult, base: ModelResult, task: TaskName) -> dict[str, Any]:
    """Return the figures of one model for JSON."""
    likelihood = result.rows.overall
    values = {**likelihood._asdict(), **result.metrics}
    if not TASKS[task].is_classification:
        values["perplexity"] = likelihood.perplexity
    # JSON has neither infinity nor NaN.
    record: dict[str, Any] = {
        name: value if value is not None and math.isfinite(value) else None for name, value in values.items()
    }
    rows = result.rows
    if len(rows.units) >= MIN_ROWS and likelihood.tokens:
        record["loss_95"] = bootstrap.mean_interval(rows.loss, rows.units)[1:]
        if result is not base:
            below_base = bootstrap.difference_interval(rows.loss, base.rows.loss, rows.units)
            record["loss_below_base"] = below_base._asdict()
    return record
