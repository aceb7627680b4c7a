"""Tables of the report: what a run has recorded, as text for people; missing values are a dash. No torch."""

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_cli.report.curves import GIB, histogram_bars, tokens_per_second
from lora_cli.report.recorded_run import Json, Measurement, RecordedRun, as_list, as_number, as_object
from lora_cli.run.console import format_bytes, format_duration

DASH = "–"
MAX_STEPS = 60  # rows of the table of steps
MAX_DIGITS = 20  # characters of a number
CLASSIFIERS = ("seq-cls", "token-cls")  # tasks
# Counts of a ledger's source that are shown if they are not 0, with their meaning.
COUNTED = {
    "cut": "rows truncated to data.max_length",
    "answers_cut": "answers truncated",
    "ends_lost": "end-of-turn tokens lost by truncation",
    "documents_split": "documents split at data.max_length",
    "labels_cut": "labels or target tokens lost by truncation",
    "splits": "rows whose answer began inside a token",
    "rewritten": "answers changed by the chat template",
    "answers_masked": "answers without loss, by their loss flags",
    "parts_masked": "parts of answers without loss, by their loss flags",
    "turns_joined": "turns joined with the turn before",
    "ends_cut": "rows cut to the last answer",
    "dropped_reasoning": "earlier answers whose reasoning the chat template omits",
    "duplicates": "rows left out as duplicates",
    "left_out_by_weight": "rows left out by weight",
    "repeated_by_weight": "rows repeated by weight",
}


class Table(NamedTuple):
    """A table of the page."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = (
        99  # columns from this one on are numbers, aligned to the right; the first column is the row's header
    )
    notes: Sequence[str] = ()


def number(value: object, digits: str = ",") -> str:
    """Return a number of JSON as text, a dash for anything else.

    One that would fill a line, or become 0, is written with an exponent: the loss of a run that diverges, or overfits.
    """
    found = as_number(value)
    if found is None:
        return DASH
    text = f"{found:{digits}}"
    is_lost = found != 0 and not digits.endswith("%") and not re.search("[1-9]", text)
    return f"{found:.3g}" if is_lost or len(text) > MAX_DIGITS else text


def summary(run: RecordedRun) -> list[tuple[str, str]]:
    """Return the key figures of a run: name and value."""
    manifest, best = run.manifest, run.best
    base = as_object(manifest.get("base"))
    adapter = as_object(run.recipe.get("adapter"))
    start = next((each for each in run.evaluations if each["step"] == 0), None)
    rows = [
        ("State", run.state.describe()),
        ("Recipe", str(manifest.get("recipe_file") or DASH)),
        ("Base model", str(base.get("path") or as_object(run.recipe.get("model")).get("path") or DASH)),
        ("Adapter", f"{adapter.get('method', DASH)}, rank {adapter.get('rank', DASH)}"),
        ("Trainable parameters", number(manifest.get("trainable_parameters"))),
    ]
    if start:
        before = "Loss before training" if run.starts_from_adapter else "Loss of the base"
        rows.append((f"{before}, held-out rows", number(start["eval_loss"], ".4f")))
    if best:
        rows.append(("Best loss, held-out rows", f"{number(best['eval_loss'], '.4f')} at step {best['step']:,}"))
        if start and start["eval_loss"]:
            rows.append(("Change from the start", number(best["eval_loss"] / start["eval_loss"] - 1, "+.1%")))
    if run.adapter_step is not None:
        rows.append(("Step of the written adapter", f"{run.adapter_step:,}"))
    return [*rows, *_cost(run)]


def _cost(run: RecordedRun) -> list[tuple[str, str]]:
    """Return tokens, time, speed and memory of a run, as far as they are recorded."""
    tokens = [t for record in run.steps if (t := as_number(record.get("tokens"))) is not None]
    seconds = [s for record in run.steps if (s := as_number(record.get("seconds"))) is not None]
    speeds = [speed for record in run.steps if (speed := tokens_per_second(record)) is not None]
    memory = [m for record in run.steps if (m := as_number(record.get("peak_memory"))) is not None]
    rows = []
    if tokens:
        rows.append(("Tokens trained on", number(sum(tokens), ",.0f")))
    if seconds:
        rows.append(("Time of all steps", format_duration(sum(seconds))))
    if speeds:
        rows.append(("Tokens per second, median", number(statistics.median(speeds), ",.0f")))
    rows.append(("Peak memory", format_bytes(max(memory)) if memory else "not recorded"))
    return rows


def evaluations_table(run: RecordedRun) -> Table | None:
    """Return all evaluations; None if there is none."""
    if not run.evaluations:
        return None
    best = run.best
    rows = [
        (
            f"{each['step']:,}" + (" (best)" if each is best else ""),
            number(each["eval_loss"], ".4f"),
            number(each.get("eval_accuracy"), ".1%"),
        )
        for each in run.evaluations
    ]
    return Table("Evaluations on the held-out rows", ("step", "loss", "accuracy"), rows, 1)


def steps_table(run: RecordedRun) -> Table | None:
    """Return at most MAX_STEPS steps, evenly spaced, the last one included; None if there is none."""
    if not run.steps:
        return None
    every = -(-len(run.steps) // MAX_STEPS)
    shown = run.steps[::-1][::every][::-1]
    rows = [
        (
            f"{record['step']:,}",
            number(record.get("loss"), ".4f"),
            number(record.get("learning_rate"), ".2e"),
            number(record.get("grad_norm"), ".3f"),
            number(tokens_per_second(record), ",.0f"),
            DASH if (m := as_number(record.get("peak_memory"))) is None else number(m / GIB, ".2f"),
        )
        for record in shown
    ]
    caption = (
        "Steps" if every == 1 else f"Steps: one of {every} ({len(rows)} of {len(run.steps):,}); the curves have all"
    )
    return Table(caption, ("step", "loss", "learning rate", "gradient norm", "tokens/s", "peak memory, GiB"), rows, 1)


def ledger_tables(run: RecordedRun) -> list[Table]:
    """Return the sources of the rows with all counts that are not 0, and the totals; empty without a ledger."""
    ledger = as_object(run.manifest.get("ledger"))
    sources = [as_object(each) for each in as_list(ledger.get("sources"))]
    if not sources:
        return []
    rows, notes = [], []
    for each in sources:
        dropped = as_object(each.get("dropped"))
        total = sum(int(count) for count in dropped.values() if isinstance(count, int))
        counts = [number(each.get(key)) for key in ("read", "added", "kept")]
        rows.append(
            (
                str(each.get("source")),
                f"{each.get('split')}, {each.get('format')}",
                *counts,
                f"{total:,}",
                number(each.get("held_out")),
                number(each.get("rows")),
            )
        )
        lines = [f"{count:,} dropped: {reason}" for reason, count in dropped.items() if isinstance(count, int)]
        lines += [
            f"{each[key]:,} {text}" for key, text in COUNTED.items() if isinstance(each.get(key), int) and each[key]
        ]
        notes += [f"{each.get('source')}: {line}" for line in lines]
    header = ("source", "split, format", "read", "added", "kept", "dropped", "held out", "in the split")
    if leaked := as_number(ledger.get("leaked")):
        notes.append(f"{leaked:,.0f} evaluation rows are also in train: their loss is not a valid test")
    return [Table("Sources", header, rows, 2, notes), _totals_table(ledger)]


def _totals_table(ledger: Json) -> Table:
    marks = ("min", "p50", "p90", "p99", "max")
    rows = []
    for split in ("train", "eval"):
        totals = as_object(ledger.get(split))
        if not totals:
            continue
        tokens, supervised = as_number(totals.get("tokens")), as_number(totals.get("supervised"))
        share = f"{supervised / tokens:.1%}" if tokens and supervised is not None else DASH
        lengths = as_object(totals.get("lengths"))
        counts = (number(totals.get("rows")), number(tokens), number(supervised), share)
        rows.append((split, *counts, *(number(lengths.get(mark)) for mark in marks)))
    header = ("split", "rows", "tokens", "supervised", "share", *(f"{mark} tokens" for mark in marks))
    return Table("Rows and tokens of an epoch, and tokens per row", header, rows, 1)


def histograms(run: RecordedRun) -> dict[str, Json]:
    """Return the histograms of tokens per row by split; empty if the run has not recorded them."""
    ledger = as_object(run.manifest.get("ledger"))
    found = {split: as_object(as_object(ledger.get(split)).get("histogram")) for split in ("train", "eval")}
    return {split: histogram for split, histogram in found.items() if histogram_bars(histogram)}


def histogram_table(by_split: dict[str, Json]) -> Table:
    """Return the bars of the histograms that have rows."""
    rows = [
        (split, f"{low:,}" if low == high else f"{low:,} to {high:,}", f"{count:,}")
        for split, histogram in by_split.items()
        for low, high, count in histogram_bars(histogram)
        if count
    ]
    return Table("Rows by their tokens", ("split", "tokens", "rows"), rows, 1)


def coverage_table(run: RecordedRun) -> Table | None:
    """Return the kinds of layers that carry the adapter; None if the run has not recorded them."""
    coverage = as_object(run.manifest.get("coverage"))
    if not coverage:
        return None
    rows = []
    for each in map(as_object, as_list(coverage.get("kinds"))):
        matched, layers = as_number(each.get("matched")), as_number(each.get("layers"))
        share = f"{matched / layers:.0%}" if layers and matched is not None else DASH
        experts = number(each.get("experts")) if each.get("experts") else DASH
        cells = (number(matched), number(layers), share, number(each.get("parameters")), experts)
        rows.append((str(each.get("kind")), *cells))
    notes = [str(note) for note in as_list(coverage.get("notes"))]
    if virtual := as_number(coverage.get("virtual_tokens")):
        notes.insert(0, f"{virtual:,} virtual tokens before each row")
    header = ("kind of layer", "with adapter", "layers", "share", "trainable parameters", "experts each")
    return Table("Layers that carry the adapter", header, rows, 1, notes)


def measurement_table(measured: Measurement, task: str) -> Table:
    """Return the figures of one result of `lora eval`: a row for each model."""
    results = {name: as_object(value) for name, value in as_object(measured.content.get("results")).items()}
    columns = {"loss": ".4f", **({} if task in CLASSIFIERS else {"perplexity": ".2f"}), "accuracy": ".1%"}
    others = {key for values in results.values() for key, value in values.items() if as_number(value) is not None}
    columns |= dict.fromkeys(sorted(others - columns.keys() - {"tokens"}), ".4f")
    rows = []
    for name, values in results.items():
        below = as_object(values.get("loss_below_base"))
        cells = [number(values.get(key), digits) for key, digits in columns.items()]
        rows.append((name, *cells, interval(values.get("loss_95")), difference(below)))
    tells = {
        True: "of this run's adapter",
        False: "of an adapter with other weights than this run's, or of the base alone",
        None: "it does not tell which adapter was measured",
    }[measured.of_adapter]
    header = ("model", *columns, "95% interval of the loss", "loss below the base, paired")
    caption = f"lora eval: {measured.file}, {number(measured.content.get('rows'))} rows"
    return Table(caption, header, rows, 1, [tells])


def interval(value: object) -> str:
    """Return `1.2000 to 1.3000` for the two ends of an interval, a dash for anything else."""
    ends = [number(each, ".4f") for each in as_list(value)]
    return DASH if len(ends) != 2 or DASH in ends else f"{ends[0]} to {ends[1]}"


def difference(value: Json) -> str:
    """Return `+0.1000 (0.0800 to 0.1200)` for an interval with its value, a dash for anything else."""
    middle = as_number(value.get("value"))
    ends = interval([value.get("low"), value.get("high")])
    return DASH if middle is None or ends == DASH else f"{number(middle, '+.4f')} ({ends})"


def spectrum_table(kinds: Iterable[Json]) -> Table:
    """Return the size of an adapter's updates, and how much of its rank they use, by kind of module."""
    rows = [
        (
            str(each["kind"]),
            f"{each['modules']:,}",
            str(each["rank"]),
            number(each["norm"], ".3f"),
            f"{each['effective_rank']:.1f}",
            *(f"{value:.1f}" for value in each["energy_ranks"].values()),
        )
        for each in kinds
    ]
    header = ("kind of module", "modules", "rank", "|ΔW|", "effective rank", "rank for 90%", "95%", "99% of the energy")
    return Table("Size and rank of the updates, means over the modules of a kind", header, rows, 1)


def environment(run: RecordedRun) -> Table | None:
    """Return versions and machine of a run; None if the manifest does not have them."""
    versions, machine = as_object(run.manifest.get("versions")), as_object(run.manifest.get("machine"))
    rows = [(name, str(value)) for name, value in versions.items()]
    for key, value in machine.items():
        shown = format_bytes(float(value)) if key == "memory" and as_number(value) else str(value)
        rows.append((key, shown))
    rows += [(f"performance: {name}", str(line)) for name, line in as_object(run.manifest.get("performance")).items()]
    command = [str(each) for each in as_list(run.manifest.get("command"))]
    if command:
        rows.append(("command", " ".join(["lora", *command])))
    return Table("Environment", ("name", "value"), rows) if rows else None
