"""Cache of tokenized rows: encode a source once to `cache/encoded/<key>/`, and read the rows from there. No tensors."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lora_cli.data.cache_versions import encoded_versions
from lora_cli.data.chunks import split_document
from lora_cli.data.class_labels import LabelTable
from lora_cli.data.conversation import Conversation
from lora_cli.data.encode import EncodedRow, truncate_row
from lora_cli.data.encode_classes import LabeledRow, RowEncoder
from lora_cli.data.encoded_rows import SCHEMA, EncodedRows, RowWithSource, to_record_batch
from lora_cli.data.encoding_progress import PART_NAME, Progress, keep_only, load_progress
from lora_cli.data.examples import SPLIT_HINT, ParsedRow, open_source, row_location, turn_options
from lora_cli.data.formats import Document, Example
from lora_cli.data.ledger import Tally
from lora_cli.data.records import MAX_FINDINGS, BadRow, findings_error
from lora_cli.data.row_size import text_size
from lora_cli.data.sources import DataSource, content_hash
from lora_cli.data.tokenization import Tokenization
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.run import atomic
from lora_cli.run.cache_entry import KIND, entry_damage, is_intact, lock_entry
from lora_cli.run.cache_use import mark_used, write_about
from lora_cli.run.checksums import checksum, write_checksums
from lora_cli.run.console import format_bytes
from lora_cli.run.disk_space import free_bytes, written_bytes
from lora_cli.run.read_file import read_json_object
from lora_cli.run.system_errors import as_os_error
from lora_cli.run.workspace import remove_leftovers, sync

ROWS_PER_BATCH = 512  # rows that are tokenized in one call and written as one Arrow batch
CHARACTERS_PER_BATCH = 1 << 23  # at which a batch of long rows ends; a token takes 150 bytes, in two batches at a time
BATCHES_PER_PART = 32  # batches in a file; an interrupted encoding loses at most one incomplete file
PROGRESS_EVERY_S = 10.0  # seconds between progress messages
TALLY_FILE = "tally.json"


class EncodedSource(NamedTuple):
    """The encoded rows of a source."""

    source: DataSource
    content: str  # hash of the source's bytes
    tally: Tally
    rows: EncodedRows


def encode_source(
    source: DataSource,
    spec: DataSpec,
    encoder: RowEncoder,
    *,
    cache: Path,
    info: Callable[[str], None],
    model: str = "",
) -> EncodedSource:
    """Return the encoded rows of a source, from the cache if possible.

    The files of the cache are verified. A damaged entry is reported and encoded again. An encoding that is interrupted
    keeps its complete files, and continues after them when it is started again.

    Safe with concurrent processes: one encodes, the others wait and use its result.

    Args:
        source: of the recipe.
        spec: the recipe's data section.
        encoder: of the task.
        cache: folder.
        info: prints messages.
        model: name of the base model, for `lora cache`.

    Raises:
        LoraError: the source cannot be read, or has bad or overlong rows that the recipe does not allow, or the cache
            cannot be written. Nothing is cached then.
    """
    content = content_hash(source)
    folder = cache / "encoded" / _key(source, spec, encoder, content)
    if entry_damage(folder) is None and (cached := _load(folder, source, content)) is not None and mark_used(folder):
        remove_leftovers(folder.parent, folder.name)  # of a process that was killed after the entry was complete
        return cached
    what = f"the rows of {source.name}"
    with lock_entry(folder, what=what, info=info):
        if is_intact(folder, what=what, info=info) and (cached := _load(folder, source, content)) is not None:
            mark_used(folder)
            return cached
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        remove_leftovers(folder.parent, unfinished.name)
        progress = load_progress(unfinished, folder.name, info=info)
        keep_only(unfinished, progress)
        _note_small_disk(source, unfinished, info)
        try:
            with as_os_error(folder, unfinished), ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
                progress = _encode(source, spec, encoder, unfinished, progress, thread, key=folder.name, info=info)
        except LoraError:
            atomic.remove(unfinished)  # the rows or the options have to change
            raise
        keep_only(unfinished, progress)
        atomic.write_json_unpublished(unfinished / TALLY_FILE, progress.tally.to_json())
        write_about(unfinished, f"{what} for {model}" if model else what, encoded_versions())
        write_checksums(unfinished, kind=KIND, published=False, key=folder.name, known=progress.parts)
        atomic.move_folder(unfinished, folder, replace=True)
        encoded = _load(folder, source, content)
        mark_used(folder)
    if encoded is None:
        raise LoraError(f"{folder} was removed right after it was written", hint="start again", exit_code=1)
    return encoded


def _note_small_disk(source: DataSource, folder: Path, info: Callable[[str], None]) -> None:
    """Report that the encoded rows may not fit on the disk: how many tokens the text has is not known before."""
    expected = sum(path.stat().st_size for path in source.files) - written_bytes(folder)
    free = free_bytes(folder)
    if source.spec.max_rows is None and free is not None and expected > free:
        info(
            f"note: the encoded rows of {source.name} need about {format_bytes(expected)} in {folder.parent}, where "
            f"{format_bytes(free)} are free; LORA_CACHE names another folder"
        )


def _key(source: DataSource, spec: DataSpec, encoder: RowEncoder, content: str) -> str:
    versions = encoded_versions()
    parts = [
        int(versions["format"]),
        content,
        encoder.identity(),
        [source.spec.format, source.spec.columns, source.spec.message_fields, source.spec.roles],
        [source.spec.max_rows, spec.on_bad_row, spec.merge_turns],
        # Both libraries affect how a template is rendered and a text is tokenized.
        [versions["transformers"], versions["tokenizers"]],
    ]
    if source.spec.template_variables:
        parts.append(source.spec.template_variables)
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _load(folder: Path, source: DataSource, content: str) -> EncodedSource | None:
    """Open a verified entry of the cache; None if there is none, or if it was removed in between."""
    try:
        tally = Tally.from_json(read_json_object(folder / TALLY_FILE))
        rows = EncodedRows(sorted(folder.glob("part-*.arrow")), source.names)
    except (FileNotFoundError, LoraError, pa.ArrowInvalid):
        return None
    return EncodedSource(source, content, tally, rows)


def _encode(
    source: DataSource,
    spec: DataSpec,
    encoder: RowEncoder,
    folder: Path,
    progress: Progress | None,
    thread: Executor,
    *,
    key: str,
    info: Callable[[str], None],
) -> Progress:
    """Encode the rows of a source to files in `folder`, after those of an interrupted encoding with `progress`."""
    reader = open_source(
        source,
        encoder.task,
        turn_options(spec),
        has_template=encoder.has_template,
        skip=progress.tally.read if progress else 0,
    )
    info(f"{source.name}: encoding, format {reader.format.name} ({reader.format.why})")
    if progress is None:
        progress = Progress(Tally(format=reader.format.name, why=reader.format.why))
    else:
        info(f"{source.name}: continuing after {progress.tally.read:,} rows, which were encoded before")
        reader.unread.columns.update(progress.tally.ignored)
        reader.unread.keys.update(progress.tally.unread_keys)
    tally = progress.tally
    before, started = tally.read, time.monotonic()
    reported = started
    complete = False
    while not complete:
        path = folder / PART_NAME.format(len(progress.parts))
        kept_before = tally.kept
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in _batches(reader.rows, encoder, thread, parse_only=lambda: _is_refused(progress, spec)):
                if complete := not batch.rows:
                    break
                if kept := _encode_batch(batch, source, spec, encoder, progress):
                    writer.write_batch(to_record_batch(kept))
                if time.monotonic() > reported + PROGRESS_EVERY_S:
                    reported = time.monotonic()
                    speed = (tally.read - before) / (reported - started)
                    info(f"{source.name}: {tally.read:,} rows, {speed:,.0f} rows/s")
        if tally.kept == kept_before and progress.parts:
            path.unlink()  # no row is left for it; an interrupted encoding gives the files of an uninterrupted one
        else:
            sync(path)
            progress.parts[path.name] = checksum(path)
        progress.save(folder, key, reader.unread, encoder)
    if progress.bad.first and spec.on_bad_row == "error":
        raise progress.bad.error(source, encoder.task, read=tally.read)
    if progress.overlong and spec.overlong in ("error", "split"):
        raise _overlong_error(source, spec, progress.overlong, tally)
    for finding in progress.bad.first:
        info(f"skipped {finding}")
    tally.labels = progress.table.to_dict()
    tally.ignored = dict(sorted(reader.unread.columns.items()))
    tally.unread_keys = {
        key: count for key, count in sorted(reader.unread.keys.items()) if not encoder.template_reads(key)
    }
    tally.check()
    return progress


class _Batch(NamedTuple):
    """Some rows, and those of them that are encoded."""

    rows: list[ParsedRow]  # empty: the source has no more
    examples: list[Example]
    started: Tokenization[Any] | None  # None without examples

    def tokenize(self, thread: Executor) -> None:
        """Wait for the chat templates, and start to tokenize in `thread`."""
        if self.started is not None:
            self.started.start(thread)


def _batches(
    rows: Iterator[ParsedRow], encoder: RowEncoder, thread: Executor, *, parse_only: Callable[[], bool]
) -> Iterator[_Batch]:
    """Yield the batches of one file, tokenized or on the way.

    While the caller encodes one, `thread` tokenizes the next one, and the template process renders the one after it.
    No row of the next file is read before: the counts of what was read are saved with each file. While `parse_only`
    returns true, no row is rendered: the rows are only checked.
    """
    rendered: _Batch | None = None
    tokenized: _Batch | None = None
    for _ in range(BATCHES_PER_PART):
        parsed = _next_rows(rows)
        if rendered is not None:
            rendered.tokenize(thread)  # one rendering at a time
        examples = [] if parse_only() else [row.example for row in parsed if not isinstance(row.example, BadRow)]
        batch = _Batch(parsed, examples, encoder.start(examples) if examples else None)
        if tokenized is not None:
            yield tokenized
        tokenized, rendered = rendered, batch
        if not parsed:
            break
    if rendered is not None:
        rendered.tokenize(thread)
    yield from (batch for batch in (tokenized, rendered) if batch is not None)


def _next_rows(rows: Iterator[ParsedRow]) -> list[ParsedRow]:
    """Return the rows of a batch: fewer if they are long, because the tokens of a batch are in memory together."""
    batch: list[ParsedRow] = []
    size = 0
    for row in islice(rows, ROWS_PER_BATCH):
        batch.append(row)
        size += 0 if isinstance(row.example, BadRow) else text_size(row.example)
        if size > CHARACTERS_PER_BATCH:
            break
    return batch


def _is_refused(progress: Progress, spec: DataSpec) -> bool:
    """Return whether the rows will be refused, so that the other rows are only checked."""
    return bool(progress.bad.first) and spec.on_bad_row == "error"


def _encode_batch(
    batch: _Batch, source: DataSource, spec: DataSpec, encoder: RowEncoder, progress: Progress
) -> list[RowWithSource]:
    """Encode some rows, count them in `progress`, and return those that are kept."""
    tally, bad = progress.tally, progress.bad
    tally.read += len(batch.rows)
    kept = []
    for item, row in _results(batch, encoder, parse_only=_is_refused(progress, spec)):
        location = row_location(source, item)
        try:
            if isinstance(row, BadRow):
                raise row
            fitting = _apply_max_length(row, spec, tally, document=isinstance(item.example, Document))
            kept += [_with_source(item, part, encoder, progress.table, location) for part in fitting]
            tally.templated += sum(isinstance(part, EncodedRow) and part.templated for part in fitting)
            if isinstance(item.example, Conversation) and fitting:
                tally.add_conversation(item.example)
            if fitting:
                tally.nulls.update(item.nulls)
            elif len(progress.overlong) < MAX_FINDINGS:
                progress.overlong.append(f"{location}: {row.length:,} tokens")
        except BadRow as error:
            bad.add(location, error)
            tally.dropped[error.reason] += 1
    tally.kept += len(kept)
    return kept


def _with_source(
    item: ParsedRow, row: EncodedRow | LabeledRow, encoder: RowEncoder, table: LabelTable, location: str
) -> RowWithSource:
    if isinstance(row, EncodedRow):
        return RowWithSource(item.file, item.line, row)
    # Target ids are stored unchanged; labels are numbered in order of first occurrence.
    values = row.values if encoder.task == "seq2seq-lm" else table.to_numbers(row, location)
    return RowWithSource(item.file, item.line, row, values)


def _results(
    batch: _Batch, encoder: RowEncoder, *, parse_only: bool
) -> Iterator[tuple[ParsedRow, EncodedRow | LabeledRow | BadRow]]:
    """Yield each row with its encoding or problem; with `parse_only`, only the rows that could not be parsed."""
    results = encoder.encode([] if parse_only else batch.examples, batch.started)
    for item in batch.rows:
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
