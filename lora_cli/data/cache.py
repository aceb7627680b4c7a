"""Cache of tokenized rows: encode a source once to `cache/encoded/<key>/`, and memory-map it later. No tensors."""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from lora_cli.data.chunks import split_document
from lora_cli.data.class_labels import LabelTable
from lora_cli.data.conversation import Conversation
from lora_cli.data.dataset import SCHEMA, EncodedFile, RowWithSource, to_record_batch
from lora_cli.data.encode import EncodedRow, truncate_row
from lora_cli.data.encode_classes import LabeledRow, RowEncoder
from lora_cli.data.examples import SPLIT_HINT, BadRows, ParsedRow, open_source, row_location, turn_options
from lora_cli.data.formats import Document
from lora_cli.data.ledger import Tally
from lora_cli.data.records import MAX_FINDINGS, BadRow, findings_error
from lora_cli.data.sources import DataSource, content_hash
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.run import atomic

CACHE_VERSION = 6  # increase it if identical rows and options would encode or be counted differently than before
ROWS_PER_BATCH = 512  # rows that are tokenized in one call and written as one Arrow batch
PROGRESS_EVERY_S = 10.0  # seconds between progress messages


class EncodedSource(NamedTuple):
    """The encoded rows of a source."""

    source: DataSource
    content: str  # hash of the source's bytes
    tally: Tally
    rows: EncodedFile


def encode_source(
    source: DataSource, spec: DataSpec, encoder: RowEncoder, *, cache: Path, info: Callable[[str], None]
) -> EncodedSource:
    """Return the encoded rows of a source, from the cache if possible.

    Safe with concurrent processes: one encodes, the others wait and use its result.

    Raises:
        LoraError: the source cannot be read, or has bad or overlong rows that the recipe does not allow. Nothing is
            cached then.
    """
    content = content_hash(source)
    folder = cache / "encoded" / _key(source, spec, encoder, content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (cached := _load(folder, source, content)) is not None:
        return cached
    with _locked(folder.with_name(f".lock-{folder.name}"), info):
        if (cached := _load(folder, source, content)) is not None:
            return cached
        # Leftovers of this key only: other machines may be writing other keys.
        atomic.remove_leftovers(folder.parent, folder.name)
        with atomic.folder(folder, replace=True) as new:
            tally = _encode(source, spec, encoder, new / "rows.arrow", info)
            (new / "tally.json").write_text(json.dumps(tally.to_json(), indent=1), encoding="utf-8")
    encoded = _load(folder, source, content)
    assert encoded is not None, folder
    return encoded


def _key(source: DataSource, spec: DataSpec, encoder: RowEncoder, content: str) -> str:
    parts = [
        CACHE_VERSION,
        content,
        encoder.identity(),
        [source.spec.format, source.spec.columns, source.spec.message_fields, source.spec.roles],
        [spec.on_bad_row, spec.merge_turns],
        # Both libraries affect how a template is rendered and a text is tokenized.
        [version("transformers"), version("tokenizers")],
    ]
    if source.spec.template_variables:
        parts.append(source.spec.template_variables)
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _load(folder: Path, source: DataSource, content: str) -> EncodedSource | None:
    try:
        tally = Tally.from_json(json.loads((folder / "tally.json").read_text(encoding="utf-8")))
        rows = EncodedFile(folder / "rows.arrow", source.names)
    except (FileNotFoundError, ValueError, pa.ArrowInvalid):
        return None  # missing, or damaged by another program: encode again
    return EncodedSource(source, content, tally, rows) if len(rows) == tally.kept else None


@contextmanager
def _locked(path: Path, info: Callable[[str], None]) -> Iterator[None]:
    # The operating system releases the lock when the process ends. The file is not deleted: a process that waits for
    # the deleted file and one that creates a new file would both get a lock.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            info("waiting for another process that encodes the same rows")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _encode(source: DataSource, spec: DataSpec, encoder: RowEncoder, path: Path, info: Callable[[str], None]) -> Tally:
    reader = open_source(source, encoder.task, turn_options(spec), has_template=encoder.has_template)
    info(f"{source.name}: encoding, format {reader.format.name} ({reader.format.why})")
    tally = Tally(format=reader.format.name, why=reader.format.why)
    bad = BadRows()
    overlong: list[str] = []
    table = LabelTable()
    started = reported = time.monotonic()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while parsed := list(islice(reader.rows, ROWS_PER_BATCH)):
            tally.read += len(parsed)
            kept = []
            for item, row in _results(parsed, encoder, parse_only=bool(bad.first) and spec.on_bad_row == "error"):
                location = row_location(source, item)
                try:
                    if isinstance(row, BadRow):
                        raise row
                    fitting = _apply_max_length(row, spec, tally, document=isinstance(item.example, Document))
                    kept += [_with_source(item, part, encoder, table, location) for part in fitting]
                    tally.templated += sum(isinstance(part, EncodedRow) and part.templated for part in fitting)
                    if isinstance(item.example, Conversation) and fitting:
                        tally.add_conversation(item.example)
                    if not fitting and len(overlong) < MAX_FINDINGS:
                        overlong.append(f"{location}: {row.length:,} tokens")
                except BadRow as error:
                    bad.add(location, error)
                    tally.dropped[error.reason] += 1
            if kept:
                writer.write_batch(to_record_batch(kept))
            tally.kept += len(kept)
            if time.monotonic() > reported + PROGRESS_EVERY_S:
                reported = time.monotonic()
                info(f"{source.name}: {tally.read:,} rows, {tally.read / (reported - started):,.0f} rows/s")
    if bad.first and spec.on_bad_row == "error":
        raise bad.error(source, encoder.task, read=tally.read)
    if overlong and spec.overlong in ("error", "split"):
        raise _overlong_error(source, spec, overlong, tally)
    for finding in bad.first:
        info(f"skipped {finding}")
    tally.labels = table.to_dict()
    tally.ignored = dict(sorted(reader.unread.columns.items()))
    tally.unread_keys = {
        key: count for key, count in sorted(reader.unread.keys.items()) if not encoder.template_reads(key)
    }
    tally.check()
    return tally


def _with_source(
    item: ParsedRow, row: EncodedRow | LabeledRow, encoder: RowEncoder, table: LabelTable, location: str
) -> RowWithSource:
    if isinstance(row, EncodedRow):
        return RowWithSource(item.file, item.line, row)
    # Target ids are stored unchanged; labels are numbered in order of first occurrence.
    values = row.values if encoder.task == "seq2seq-lm" else table.to_numbers(row, location)
    return RowWithSource(item.file, item.line, row, values)


def _results(
    parsed: list[ParsedRow], encoder: RowEncoder, *, parse_only: bool
) -> Iterator[tuple[ParsedRow, EncodedRow | LabeledRow | BadRow]]:
    """Yield each row with its encoding or problem; with `parse_only`, only the rows that could not be parsed."""
    valid = [item.example for item in parsed if not isinstance(item.example, BadRow)]
    results = encoder.encode([] if parse_only else valid)
    for item in parsed:
        if isinstance(item.example, BadRow):
            yield item, item.example
        elif not parse_only:
            yield item, next(results)


TOO_LONG = "longer than data.max_length"
OVERLONG_HINT = "raise data.max_length, or set data.overlong to drop or truncate"


def _apply_max_length(
    row: EncodedRow | LabeledRow, spec: DataSpec, tally: Tally, *, document: bool
) -> Sequence[EncodedRow | LabeledRow]:
    """Apply `data.overlong` to a row: return it, its truncated form, its chunks, or nothing; update the tally."""
    if row.length <= spec.max_length:
        if isinstance(row, EncodedRow):
            _count_answers(row, tally)
        return [row]
    if spec.overlong == "split" and isinstance(row, EncodedRow) and document:
        chunks = split_document(row, length=spec.max_length, stride=spec.stride)
        tally.documents_split += 1
        tally.added += len(chunks) - 1
        return chunks
    if isinstance(row, LabeledRow):
        kept: EncodedRow | LabeledRow | None = row.truncated
        lost = row.supervised - (row.truncated.supervised if row.truncated else 0)
    else:
        kept = truncate_row(row, spec.max_length)
        lost = 0
    if spec.overlong != "truncate" or not kept or not kept.supervised:
        tally.dropped[TOO_LONG if spec.overlong != "truncate" else "nothing to learn after truncation"] += 1
        return []
    tally.cut += 1
    if isinstance(row, LabeledRow):
        tally.labels_cut += lost
    else:
        _count_answers(row, tally)
        tally.answers_cut += sum(start < spec.max_length < stop for start, stop in row.answer_spans)
        tally.ends_lost += sum(stop > spec.max_length for _, stop in row.answer_spans)
    return [kept]


def _count_answers(row: EncodedRow, tally: Tally) -> None:
    tally.splits += row.split
    tally.rewritten += row.counts.rewritten
    tally.dropped_reasoning += row.counts.dropped
    tally.inserted += row.counts.inserted
    tally.unprompted += row.counts.unprompted
    tally.empty += row.counts.empty
    tally.reasoned += row.counts.reasoned
    tally.answered += row.counts.answered


def _overlong_error(source: DataSource, spec: DataSpec, first: list[str], tally: Tally) -> LoraError:
    total = tally.dropped[TOO_LONG]
    return findings_error(
        f"{source.name}: {total:,} of {tally.read:,} rows {'is' if total == 1 else 'are'} longer than "
        f"data.max_length ({spec.max_length:,} tokens)",
        first,
        total,
        hint=SPLIT_HINT if spec.overlong == "split" else OVERLONG_HINT,
    )
