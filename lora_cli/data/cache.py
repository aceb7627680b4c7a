"""Encode a source once: rows and tally go to `cache/encoded/<key>/`, and a second start maps them. No tensors."""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from lora_cli.data.class_labels import LabelTable
from lora_cli.data.dataset import SCHEMA, EncodedFile, RowWithSource, to_record_batch
from lora_cli.data.encode import EncodedRow, truncate_row
from lora_cli.data.encode_classes import LabeledRow, RowEncoder
from lora_cli.data.examples import BadRows, ParsedRow, open_source, row_location
from lora_cli.data.ledger import Tally
from lora_cli.data.records import MAX_FINDINGS, BadRow, findings_error
from lora_cli.data.sources import DataSource, content_hash
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.run import atomic

CACHE_VERSION = 2  # raise it when the same rows and options would be encoded otherwise than before
ROWS_PER_BATCH = 512  # rows that are tokenised in one call and written as one Arrow batch
PROGRESS_EVERY_S = 10.0  # seconds between messages while encoding


class EncodedSource(NamedTuple):
    """A source as the model will read it."""

    source: DataSource
    content: str  # hash of its bytes
    tally: Tally
    rows: EncodedFile


def encode_source(
    source: DataSource, spec: DataSpec, encoder: RowEncoder, *, cache: Path, info: Callable[[str], None]
) -> EncodedSource:
    """The rows of a source, from the cache where they are there.

    Safe with other processes at the same time: one encodes, the others wait for it and map its result.

    Raises:
        LoraError: bad or overlong rows that the recipe does not let pass; nothing is cached then.
    """
    content = content_hash(source)
    folder = cache / "encoded" / _key(source, spec, encoder, content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (found := _load(folder, source, content)) is not None:
        return found
    with _locked(folder.with_name(f".lock-{folder.name}"), info):
        if (found := _load(folder, source, content)) is not None:
            return found
        atomic.remove_leftovers(folder.parent, folder.name)  # other keys may be another machine's, at work on them
        with atomic.folder(folder, replace=True) as fresh:
            tally = _build(source, spec, encoder, fresh / "rows.arrow", info)
            (fresh / "tally.json").write_text(json.dumps(tally.to_json(), indent=1), encoding="utf-8")
    found = _load(folder, source, content)
    assert found is not None, folder
    return found


def _key(source: DataSource, spec: DataSpec, encoder: RowEncoder, content: str) -> str:
    parts = [
        CACHE_VERSION,
        content,
        encoder.identity(),
        [source.spec.format, source.spec.columns, spec.on_bad_row],
        # Both decide how a template is rendered and a text cut into tokens.
        [version("transformers"), version("tokenizers")],
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _load(folder: Path, source: DataSource, content: str) -> EncodedSource | None:
    try:
        tally = Tally.from_json(json.loads((folder / "tally.json").read_text(encoding="utf-8")))
        rows = EncodedFile(folder / "rows.arrow", source.names)
    except (FileNotFoundError, ValueError, pa.ArrowInvalid):
        return None  # not there, or damaged by something other than us: encoded again
    return EncodedSource(source, content, tally, rows) if len(rows) == tally.kept else None


@contextmanager
def _locked(path: Path, info: Callable[[str], None]) -> Iterator[None]:
    # The system drops the lock with the process, however it ends; the file stays, because to delete it under
    # someone who waits for it would let two in.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            info("another process is encoding the same rows: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: DataSource, spec: DataSpec, encoder: RowEncoder, path: Path, info: Callable[[str], None]) -> Tally:
    intake = open_source(source, encoder.task)
    info(f"{source.name}: encoding, format {intake.format.name} ({intake.format.why})")
    tally = Tally(format=intake.format.name, why=intake.format.why)
    bad = BadRows()
    overlong: list[str] = []
    table = LabelTable()
    started = said = time.monotonic()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while items := list(islice(intake.items, ROWS_PER_BATCH)):
            tally.read += len(items)
            fits = []
            for item, row in _results(items, encoder, read_only=bool(bad.first) and spec.on_bad_row == "error"):
                place = row_location(source, item)
                try:
                    if isinstance(row, BadRow):
                        raise row
                    kept = _apply_max_length(row, spec, tally)
                    if kept is not None:
                        fits.append(_placed(item, kept, encoder, table, place))
                    elif len(overlong) < MAX_FINDINGS:
                        overlong.append(f"{place}: {row.length:,} tokens")
                except BadRow as found:
                    bad.add(place, found)
                    tally.dropped[found.reason] += 1
            if fits:
                writer.write_batch(to_record_batch(fits))
            tally.kept += len(fits)
            if time.monotonic() > said + PROGRESS_EVERY_S:
                said = time.monotonic()
                info(f"{source.name}: {tally.read:,} rows, {tally.read / (said - started):,.0f} rows/s")
    if bad.first and spec.on_bad_row == "error":
        raise bad.refusal(source, encoder.task, read=tally.read)
    if overlong and spec.overlong == "error":
        raise _overlong_error(source, spec, overlong, tally)
    for finding in bad.first:
        info(f"skipped {finding}")
    tally.labels = table.found()
    tally.ignored = dict(sorted(intake.ignored.items()))
    tally.check()
    return tally


def _placed(
    item: ParsedRow, row: EncodedRow | LabeledRow, encoder: RowEncoder, table: LabelTable, place: str
) -> RowWithSource:
    if isinstance(row, EncodedRow):
        return RowWithSource(item.file, item.line, row)
    # A target text's ids are what they are; labels are numbered as they come.
    values = row.values if encoder.task == "seq2seq-lm" else table.number(row, place)
    return RowWithSource(item.file, item.line, row, values)


def _results(
    items: list[ParsedRow], encoder: RowEncoder, *, read_only: bool
) -> Iterator[tuple[ParsedRow, EncodedRow | LabeledRow | BadRow]]:
    """Every item that has a result; where the run will stop anyway, only bad ones are of interest."""
    good = [item.example for item in items if not isinstance(item.example, BadRow)]
    results = encoder.encode([] if read_only else good)
    for item in items:
        if isinstance(item.example, BadRow):
            yield item, item.example
        elif not read_only:
            yield item, next(results)


TOO_LONG = "longer than data.max_length"


def _apply_max_length(row: EncodedRow | LabeledRow, spec: DataSpec, tally: Tally) -> EncodedRow | LabeledRow | None:
    """The row as `data.overlong` has it, or None where it is left out; counts what it costs."""
    if row.length <= spec.max_length:
        if isinstance(row, EncodedRow):
            tally.splits += row.split
            tally.rewritten += row.rewritten
        return row
    if isinstance(row, LabeledRow):
        kept: EncodedRow | LabeledRow | None = row.truncated
        lost = row.supervised - (row.truncated.supervised if row.truncated else 0)
    else:
        kept = truncate_row(row, spec.max_length)
        lost = 0
    if spec.overlong != "truncate" or not kept or not kept.supervised:
        tally.dropped[TOO_LONG if spec.overlong != "truncate" else "nothing to learn after the cut"] += 1
        return None
    tally.cut += 1
    if isinstance(row, LabeledRow):
        tally.labels_cut += lost
    else:
        tally.splits += row.split
        tally.rewritten += row.rewritten
        tally.answers_cut += sum(start < spec.max_length < stop for start, stop in row.answer_spans)
        tally.ends_lost += sum(stop > spec.max_length for _, stop in row.answer_spans)
    return kept


def _overlong_error(source: DataSource, spec: DataSpec, first: list[str], tally: Tally) -> LoraError:
    total = tally.dropped[TOO_LONG]
    return findings_error(
        f"{source.name}: {total:,} of {tally.read:,} rows {'is' if total == 1 else 'are'} longer than "
        f"data.max_length ({spec.max_length:,} tokens)",
        first,
        total,
        hint="raise data.max_length, or set data.overlong to drop or truncate, counted",
    )
