"""Make the page of a report: HTML with its style, its scripts and its data, which needs no other file. No torch.

All text of rows, models, recipes and names is data: Jinja escapes it, and only the two scripts of the page run, which
its content security policy names by their hashes.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lora_cli.report import answers, compare, tables
from lora_cli.report.compare import RowLossIntervals
from lora_cli.report.curves import CHARTS, chart_specs, histogram_spec, page_data, spectrum_spec
from lora_cli.report.recorded_run import Json, RecordedRun, as_number
from lora_cli.report.tables import Table
from lora_cli.report.verdicts import Verdict, verdict_table
from lora_cli.run.run_results import PAGE_MARK

MAX_MANIFEST = 200_000  # characters that are shown
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


class ReportedRun(NamedTuple):
    """A run, and what is computed or looked for elsewhere for its report."""

    run: RecordedRun
    spectra: Sequence[Json] = ()  # of its adapter, by kind of module: see `merging/spectrum.py`
    no_spectra: str = ""  # why there are none
    verdicts: Sequence[Verdict] = ()


class Report(NamedTuple):
    """What the page shows."""

    runs: Sequence[ReportedRun]
    intervals: Mapping[str, RowLossIntervals]  # by the run's name
    changed: str  # when the files of the runs changed last

    @property
    def title(self) -> str:
        """The title of the page."""
        return ", ".join(each.run.name for each in self.runs)


def render_page(report: Report, *, library: str, live: bool = False) -> str:
    """Return the page as HTML.

    Args:
        report: what it shows.
        library: the script of the chart library.
        live: whether the page asks its server for news.
    """
    script = _file("report.js")
    policy = [
        "default-src 'none'",
        f"script-src {_hash_source(library)} {_hash_source(script)}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if live else []),
    ]
    return (
        _environment()
        .get_template("page.html")
        .render(
            mark=Markup(PAGE_MARK),
            policy="; ".join(policy),
            style=Markup(_file("report.css")),
            library=Markup(library),
            script=Markup(script),
            data=script_json(script_data(report)),
            live=live,
            **_values(report),
        )
    )


def render_parts(report: Report) -> dict[str, str]:
    """Return the parts of the page that news of a run replace, by their id: everything but the curves."""
    values = _values(report)
    return {part: _environment().get_template(f"{part}.html").render(**values) for part in ("summary", "sections")}


def script_data(report: Report) -> Json:
    """Return what the script draws: the runs' columns, and the charts by the id of their place in the page."""
    runs = [each.run for each in report.runs]
    static: Json = {}
    for number, each in enumerate(report.runs):
        if by_split := tables.histograms(each.run):
            static[f"lengths-{number}"] = histogram_spec(by_split)
        if each.spectra:
            static[f"spectrum-{number}"] = spectrum_spec(each.spectra)
    return {"runs": [page_data(run) for run in runs], "charts": chart_specs(runs), "static": static}


def script_json(value: object) -> Markup:
    """Return JSON for the inside of a script element, from which no text can end the element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _values(report: Report) -> dict[str, Any]:
    runs = [each.run for each in report.runs]
    several = len(runs) > 1
    charts = chart_specs(runs)
    return {
        "title": report.title,
        "changed": report.changed,
        "several": several,
        "charts": [
            {**chart._asdict(), "summary": _chart_summary(chart.key, runs)} for chart in CHARTS if chart.key in charts
        ],
        "final": compare.final_table(runs, report.intervals) if several else None,
        "differences": compare.recipe_differences(runs) if several else None,
        "runs": [_run_values(number, each, report.intervals) for number, each in enumerate(report.runs)],
    }


def _run_values(number: int, each: ReportedRun, intervals: Mapping[str, RowLossIntervals]) -> dict[str, Any]:
    run = each.run
    summary = tables.summary(run)
    if (found := intervals.get(run.name)) is not None:
        shown = f"{tables.interval(list(found.loss[1:]))} ({found.rows:,} rows, {found.source})"
        summary.append(("95% interval of the adapter's loss", shown))
    mask = {"label_mask": "see the label mask above"} if "label_mask" in run.manifest else {}
    manifest = json.dumps(run.manifest | mask, indent=2, ensure_ascii=False)
    histograms = tables.histograms(run)
    task = str(run.manifest.get("task"))
    return {
        "id": number,
        "name": run.name,
        "eval_command": run.eval_command,
        "state": run.state.name,
        "state_text": run.state.describe(),
        "notes": run.notes,
        "summary": summary,
        "evaluations": tables.evaluations_table(run),
        "steps": tables.steps_table(run),
        "ledger": tables.ledger_tables(run),
        "lengths": tables.histogram_table(histograms) if histograms else None,
        "mask": answers.mask_rows(run),
        "coverage": tables.coverage_table(run),
        "measurements": [tables.measurement_table(measured, task) for measured in run.measurements],
        "answers": answers.answer_sources(run),
        "classifies": task in tables.CLASSIFIERS,
        "spectrum": tables.spectrum_table(each.spectra) if each.spectra else None,
        "no_spectra": each.no_spectra,
        "verdicts": [verdict_table(verdict) for verdict in each.verdicts],
        "environment": tables.environment(run),
        "recipe": run.recipe_text,
        "manifest": manifest[:MAX_MANIFEST],
        "manifest_cut": max(0, len(manifest) - MAX_MANIFEST),
    }


def _chart_summary(key: str, runs: Sequence[RecordedRun]) -> str:
    """Return the curve of each run in one sentence, for readers who do not see it."""
    parts = []
    for data in map(page_data, runs):
        pairs = zip(data["columns"]["step"], data["columns"][key], strict=True)
        known = [(step, value) for step, value in pairs if as_number(value) is not None]
        if not known:
            parts.append(f"{data['name']}: not recorded")
            continue
        low = min(known, key=lambda each: each[1])
        high = max(known, key=lambda each: each[1])
        (first, start), (last, end) = known[0], known[-1]
        parts.append(
            f"{data['name']}: {start:.4g} at step {first:,}, {end:.4g} at step {last:,}; lowest {low[1]:.4g} at step "
            f"{low[0]:,}, highest {high[1]:.4g} at step {high[0]:,}"
        )
    return ". ".join(parts)


def _hash_source(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _file(name: str) -> str:
    return (files("lora_cli.report") / "static" / name).read_text(encoding="utf-8")


def _show_controls(value: object) -> object:
    """Return a text with pictures of its control characters: HTML has no NUL, and shows no other one."""
    return value.translate(CONTROL_PICTURES) if type(value) is str else value  # not Markup: the style, the scripts


@cache
def _environment() -> Environment:
    folder = str(files("lora_cli.report") / "static")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_show_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["table"] = lambda value: isinstance(value, Table)
    return environment
