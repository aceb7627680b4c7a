"""The curves of runs: columns of their logs for the page, and the charts as Vega-Lite specifications. No torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_cli.report.recorded_run import Json, RecordedRun, as_number, as_object

# Colors are variables of the page's style sheet, so that light, dark and print need no other chart.
MAX_COLORS = 8
INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--line)"
CONFIG: Json = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED, "titleColor": MUTED, "gridColor": GRID, "domainColor": GRID, "tickColor": GRID,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
    },
    "legend": {"labelColor": INK, "titleColor": MUTED, "labelFontSize": 12, "symbolStrokeWidth": 2, "symbolOpacity": 1},
    "title": {"color": INK},
}  # fmt: skip


class Chart(NamedTuple):
    """A chart over the steps of runs."""

    key: str  # column of the page's data
    title: str
    unit: str  # of the loss, that of the runs
    smoothed: bool  # whether a running mean is drawn too
    what: str  # what it shows, in one sentence


CHARTS = (
    Chart("loss", "Loss", "", True, "Loss of each training step, and of the held-out rows."),
    Chart("learning_rate", "Learning rate", "", False, "Learning rate of each step."),
    Chart("grad_norm", "Gradient norm", "L2, before clipping", True, "Norm of each step's gradient."),
    Chart(
        "tokens_per_second", "Speed", "tokens per second", True, "Tokens of each step, without padding, by its time."
    ),
    Chart(
        "peak_memory", "Peak memory", "GiB", False, "Largest memory up to each step: of the GPU, else of the process."
    ),
)
GIB = 2**30


def columns(run: RecordedRun) -> dict[str, list[Any]]:
    """Return the columns that the page draws, all of equal length: `step` and a column for each chart; null: unknown.

    The numbers are those of metrics.jsonl, unrounded; of peak memory, GiB.
    """
    result: dict[str, list[Any]] = {"step": [record["step"] for record in run.steps]}
    for key in ("loss", "learning_rate", "grad_norm"):
        result[key] = [as_number(record.get(key)) for record in run.steps]
    result["tokens_per_second"] = [tokens_per_second(record) for record in run.steps]
    memory = [as_number(record.get("peak_memory")) for record in run.steps]
    result["peak_memory"] = [None if value is None else value / GIB for value in memory]
    return result


def tokens_per_second(record: Json) -> float | None:
    """Return the speed of a step; None if its record has no tokens or no time."""
    tokens, seconds = as_number(record.get("tokens")), as_number(record.get("seconds"))
    return as_number(tokens / seconds) if tokens is not None and seconds else None


def page_data(run: RecordedRun) -> Json:
    """Return what the script of the page needs of a run: columns, evaluations [[step, loss]], spikes and best step."""
    best = run.best
    return {
        "name": run.name,
        "columns": columns(run),
        "evaluations": [[each["step"], each["eval_loss"]] for each in run.evaluations],
        "spikes": [record["step"] for record in run.steps if as_object(record.get("spike"))],
        "best": None if best is None else best["step"],
    }


def chart_specs(runs: Sequence[RecordedRun]) -> dict[str, Json]:
    """Return the charts that the runs have data for, by key: Vega-Lite, with the data set `points` left to the page."""
    names = [run.name for run in runs]
    known = [columns(run) for run in runs]
    unit = " or ".join(sorted({run.loss_unit for run in runs}))
    return {
        chart.key: _spec(chart._replace(unit=unit) if chart.key == "loss" else chart, names)
        for chart in CHARTS
        if any(value is not None for each in known for value in each[chart.key])
    }


def _spec(chart: Chart, names: Sequence[str]) -> Json:
    """Return a chart of lines over steps.

    A point has `step`, `value`, `run`, and `kind`: the layer that draws it. With one run the color tells training from
    held-out rows, with several the run. The page sets the parameters `low` and `high` (steps), and the data set
    `cursor`.
    """
    several = len(names) > 1
    color: Json = (
        {"field": "run", "type": "nominal", "title": None, "scale": {"domain": list(names), "range": _colors(names)}}
        if several
        else {
            "field": "label", "type": "nominal", "title": None,
            "scale": {
                "domain": ["training", "held-out rows"], "range": ["var(--c0)", "var(--c1)"],
            },
        }
    )  # fmt: skip
    if not several and chart.key != "loss":
        color = {"value": "var(--c0)"}
    elif several:
        color["legend"] = {**_legend(names), "symbolType": "stroke"}
    else:
        color["legend"] = {"orient": "bottom"}
    # At most one tick a step: tickMinStep lets Vega draw half steps, which it labels as whole ones.
    ticks = {"expr": "min(ceil(width / 50), high - low)"}
    x = {
        "field": "step", "type": "quantitative", "title": "step",
        "axis": {"tickCount": ticks, "format": ",d", "labelFlush": False},
        "scale": {"nice": False, "domain": [{"expr": "low"}, {"expr": "high"}]},
    }  # fmt: skip
    # Vega rounds the one label of a constant to a whole number: a learning rate of 2e-4 would be 0.
    label = "domain('y')[0] === domain('y')[1] ? format(datum.value, ',~g') : datum.label"
    y: Json = {
        "field": "value", "type": "quantitative", "title": chart.unit or None, "axis": {"labelExpr": label},
        "scale": {"zero": False, "padding": 6},
    }  # fmt: skip
    encoding = {"x": x, "y": y, "color": color, "detail": {"field": "run"}}
    if several:  # not by color alone: print, and readers who see no colors
        kinds = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
        dashes = [kinds[(n + n // MAX_COLORS) % len(kinds)] for n in range(len(names))]  # no pair with a color twice
        encoding["strokeDash"] = {
            "field": "run", "type": "nominal", "title": None, "legend": color["legend"],
            "scale": {"domain": list(names), "range": dashes},
        }  # fmt: skip

    def layer(kind: str, mark: Json, encoded: Json = encoding) -> Json:
        return {
            "data": {"name": "points"},
            "transform": [{"filter": f"datum.kind === '{kind}'"}],
            "mark": {"clip": True, "aria": False, **mark},
            "encoding": encoded,
        }

    points = {name: value for name, value in encoding.items() if name != "strokeDash"}
    symbol = {"clip": False, "type": "point", "opacity": 1}  # the page leaves out those outside of the range
    layers = [
        layer("thin", {"type": "line", "strokeWidth": 1, "opacity": 0.35}),
        layer("line", {"type": "line", "strokeWidth": 2}),
        layer("dot", {**symbol, "filled": True, "size": 40, "shape": "circle"}, points),
    ]
    if chart.key == "loss":
        layers += [
            layer("evaluation", {"type": "line", "strokeWidth": 1.5}),
            layer("diamond", {**symbol, "filled": True, "size": 45, "shape": "diamond"}, points),
            layer("best", {**symbol, "size": 190, "strokeWidth": 2, "shape": "circle"}, points),
            layer("spike", {**symbol, "size": 70, "shape": "triangle-up"}, points),
        ]
    layers.append(
        {
            "data": {"name": "cursor"},
            "mark": {"type": "rule", "color": INK, "strokeDash": [3, 3], "aria": False},
            "encoding": {"x": x},
        }
    )
    return {
        "width": "container",
        "height": 230,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "low", "value": 0}, {"name": "high", "value": 1}],
        "datasets": {"points": [], "cursor": []},
        "layer": layers,
        "config": CONFIG,
    }


def _colors(names: Sequence[str]) -> list[str]:
    return [f"var(--c{number % MAX_COLORS})" for number in range(len(names))]


def _legend(names: Sequence[str]) -> Json:
    """Return a legend below a chart with as many columns as it has place for."""
    width = 7 * max(map(len, names)) + 30  # pixels
    columns = {"expr": f"max(1, floor(width / {width}))"}
    return {"orient": "bottom", "columns": columns, "labelLimit": {"expr": "width - 30"}}


def histogram_spec(histograms: dict[str, Json]) -> Json:
    """Return the bar chart of tokens per row; `histograms` are those of the ledger by split: train and eval.

    Each split has its own part of a bar's width: drawn over each other, one would hide the other.
    """
    splits = list(histograms)
    bars: list[Json] = []
    for number, (split, histogram) in enumerate(histograms.items()):
        for low, high, rows in histogram_bars(histogram):
            width = (high + 1 - low) / len(splits)
            bars.append({"split": split, "from": low + number * width, "to": low + (number + 1) * width, "rows": rows})
    most = max((bar["rows"] for bar in bars), default=1)
    tokens = max((bar["to"] for bar in bars), default=1) - min((bar["from"] for bar in bars), default=0)
    return {
        "width": "container",
        "height": 170,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": bars},
        "mark": {"type": "bar", "aria": False, "binSpacing": 1},
        "encoding": {
            "x": {
                "field": "from", "type": "quantitative", "title": "tokens per row", "bin": {"binned": True},
                "axis": {"format": ",d", "tickCount": {"expr": f"min(ceil(width / 50), {tokens:g})"}},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "rows", "type": "quantitative", "title": "rows", "axis": {"tickCount": max(1, min(5, most))},
                "stack": None,
            },
            "color": {
                "field": "split", "type": "nominal", "title": None, "legend": {"orient": "bottom"},
                "scale": {"domain": splits, "range": _colors(splits)},
            },
        },
        "config": CONFIG,
    }  # fmt: skip


def histogram_bars(histogram: Json) -> list[tuple[int, int, int]]:
    """Return the bars of a ledger's histogram: first tokens, last tokens, rows; empty if it is damaged."""
    first, width, rows = (histogram.get(key) for key in ("first", "width", "rows"))
    if not (isinstance(first, int) and isinstance(width, int) and isinstance(rows, list)):
        return []
    return [
        (first + number * width, first + (number + 1) * width - 1, count)
        for number, count in enumerate(rows)
        if isinstance(count, int)
    ]


def spectrum_spec(kinds: Sequence[Json]) -> Json:
    """Return the chart of an adapter's median spectra by kind of module; `kinds` have `kind` and `spectrum`."""
    values = [
        {"kind": each["kind"], "component": number, "value": value}
        for each in kinds
        for number, value in enumerate(each["spectrum"], start=1)
        if value > 0
    ]
    names = [each["kind"] for each in kinds]
    scale, legend = {"domain": names}, _legend(names)
    ticks = max(1, min(10, max(len(each["spectrum"]) for each in kinds) - 1))
    return {
        "width": "container",
        "height": 230,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": values},
        "mark": {"type": "line", "point": {"size": 25}, "aria": False},
        "encoding": {
            "x": {"field": "component", "type": "quantitative", "title": "component", "axis": {"tickCount": ticks}},
            "y": {
                "field": "value", "type": "quantitative", "title": "singular value / largest", "scale": {"type": "log"},
            },
            "color": {
                "field": "kind", "type": "nominal", "title": None, "legend": legend,
                "scale": {**scale, "range": _colors(names)},
            },
            "shape": {"field": "kind", "type": "nominal", "title": None, "legend": legend, "scale": scale},
        },
        "config": CONFIG,
    }  # fmt: skip
