"""Verdicts of `lora merge` (merge.json) and `lora export` (export.json) on an adapter, found by its hash. No torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.report.recorded_run import MAX_JSON_BYTES, Json, as_list, as_number, as_object
from lora_cli.report.tables import DASH, Table, number
from lora_cli.run.folder import EXPORT_VERDICT, MERGE_VERDICT
from lora_cli.run.read_file import read_json_object


class Verdict(NamedTuple):
    """A merge or an export of an adapter."""

    path: Path  # of the JSON file
    kind: str  # merge or export
    content: Json


def find_verdicts(folder: Path, adapter: str | None, more: Sequence[Path] = ()) -> list[Verdict]:
    """Return the merges and exports of an adapter, sorted by path.

    They are looked for in the run folder, beside it, in the working folder, and in `more`: in the folders there, not
    deeper.

    Args:
        folder: of the run.
        adapter: SHA-256 of its adapter's weights; None: unknown, so that nothing is found.
        more: files and folders of merges and exports.
    """
    if adapter is None:
        return []
    found: dict[Path, Verdict] = {}
    for path in _candidates([folder, folder.absolute().parent, Path.cwd(), *more]):
        if (verdict := _read(path)) is not None and _adapter_of(verdict) == adapter:
            found.setdefault(path.resolve(), verdict)
    return [found[path] for path in sorted(found)]


def _candidates(places: Sequence[Path]) -> Iterator[Path]:
    # os.path asks without an exception: what a working folder has beside the run can be another user's, or a loop.
    for place in places:
        if os.path.isfile(place):
            yield place
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            continue  # nobody has named it, or it is no folder
        for entry in entries:
            if entry.name == MERGE_VERDICT or entry.name.endswith(EXPORT_VERDICT):
                yield Path(entry.path)
            elif os.path.isdir(entry.path):
                paths = (Path(entry.path, name) for name in (MERGE_VERDICT, EXPORT_VERDICT))
                yield from filter(os.path.isfile, paths)


def _read(path: Path) -> Verdict | None:
    """Return the verdict in a file, or beside an exported file; None if there is none."""
    if not path.name.endswith(".json"):
        path = path.with_suffix(f".{EXPORT_VERDICT}")
    try:
        content = read_json_object(path, limit=MAX_JSON_BYTES)
    except LoraError:
        return None
    return Verdict(path, "merge" if path.name == MERGE_VERDICT else "export", content)


def _adapter_of(verdict: Verdict) -> object:
    if verdict.kind == "merge":
        return verdict.content.get("adapter")
    return as_object(verdict.content.get("source")).get("adapter")


def verdict_table(verdict: Verdict) -> Table:
    """Return what was verified of a merge or an export."""
    return _merge_table(verdict) if verdict.kind == "merge" else _export_table(verdict)


def _merge_table(verdict: Verdict) -> Table:
    content = verdict.content
    logits, worst = as_object(content.get("logits")), as_object(content.get("smallest_retained"))
    rows = [
        ("every weight, read back, equals PEFT's merge, rounded once", "verified"),
        ("base", str(content.get("base"))),
        ("weights of the base", str(content.get("weights"))),
        ("tensors changed", f"{number(content.get('changed'))} of {number(content.get('tensors'))}"),
        ("smallest share of an update after rounding", f"{number(worst.get('share'), '.1%')} ({worst.get('tensor')})"),
    ]
    if logits:
        rows += [
            ("compared on", str(logits.get("probes"))),
            ("largest difference of a logit, relative", number(logits.get("max_difference"), ".1e")),
            ("KL divergence, nats", number(logits.get("kl"), ".1e")),
            ("same most likely output", number(logits.get("top1"), ".1%")),
            ("effect of the adapter retained", number(logits.get("retained"), ".1%")),
        ]
    else:
        rows.append(("logits", "not compared"))
    return Table(f"Merge: {verdict.path.parent.name}", ("check", "found"), rows)


def _export_table(verdict: Verdict) -> Table:
    content = verdict.content
    rows = []
    for check in map(as_object, as_list(content.get("checks"))):
        passed = "note" if check.get("name") == "note" else "verified" if check.get("passed") is True else "WRONG"
        rows.append((str(check.get("name")), passed, str(check.get("found"))))
    sizes = [as_number(as_object(each).get("bytes")) for each in as_object(content.get("files")).values()]
    total = sum(size for size in sizes if size is not None)
    name = verdict.path.parent.name if verdict.path.name == EXPORT_VERDICT else verdict.path.name
    form = content.get("quantize") or DASH
    caption = f"Export: {name}, format {content.get('format')}, form {form}, {total:,.0f} bytes"
    return Table(caption, ("check", "verdict", "found"), rows)
