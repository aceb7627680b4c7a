"""Parse the rows of a dataset source, for encoding and for `lora check --no-model`. No tokenizer, no torch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.data import formats, sources
from lora_cli.data.conversation import Conversation
from lora_cli.data.formats import DETECTION_ROWS, FORMATS, DetectedFormat, Example
from lora_cli.data.ledger import Tally, conversation_notes
from lora_cli.data.records import MAX_FINDINGS, BadRow, Finding, Record, findings_error
from lora_cli.data.sources import DataSource
from lora_cli.data.turns import TurnOptions
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TASK_FORMATS, TaskName

SPLIT_HINT = "only rows of format text can be split: set data.overlong to drop or truncate, or raise data.max_length"
MAX_DETECTION_ROWS = 1024  # largest number of rows, valid or not, that are read to detect the format


class ParsedRow(NamedTuple):
    """One row of a source as an example, or the reason why it cannot be used."""

    file: int  # index into the source's names
    line: int  # 1-based
    example: Example | BadRow
    nulls: Sequence[str] = ()  # as in records.Line


class SourceReader(NamedTuple):
    """A source whose format is known; its rows can be iterated once."""

    format: DetectedFormat
    rows: Iterator[ParsedRow]
    ignored: Counter[str]  # rows by column that the format does not use; counted while reading


def open_source(source: DataSource, task: TaskName, turns: TurnOptions, *, skip: int = 0) -> SourceReader:
    """Open a source for reading, and choose its format and columns from its first rows; leave out the first `skip`.

    `turns` says how turns that are not in the usual order are handled.

    Raises:
        LoraError: the source has no rows, no known format, or lacks columns that data.columns names.
    """
    stream = sources.read_records(source)
    first: list[Record] = []
    valid: list[tuple[str, dict[str, Any]]] = []
    for record in islice(stream, MAX_DETECTION_ROWS):
        first.append(record)
        if not isinstance(record.row, BadRow):
            valid.append((row_location(source, record), record.row))
            if len(valid) == DETECTION_ROWS:
                break
    format_ = _resolve_format(source, valid, task)
    ignored: Counter[str] = Counter()
    rows = islice(chain(first, stream), skip, None)
    return SourceReader(format_, _parsed_rows(rows, format_, turns, ignored), ignored)


def turn_options(spec: DataSpec) -> TurnOptions:
    """Return how a recipe handles turns that are not in the usual order."""
    return TurnOptions(join=spec.merge_turns, cut_end=spec.on_bad_row == "skip")


def row_location(source: DataSource, row: Record | ParsedRow) -> str:
    """Return the file and line of a row for messages: `data/train.jsonl:17`."""
    return f"{source.names[row.file]}:{row.line}"


def _resolve_format(source: DataSource, valid: list[tuple[str, dict[str, Any]]], task: TaskName) -> DetectedFormat:
    columns = source.spec.columns
    rows = [row for _, row in valid]
    if missing := [column for column in columns.values() if rows and not any(column in row for row in rows)]:
        raise LoraError(
            f"data.columns: {source.name} has no column {missing[0]}",
            hint=f"its columns are {formats.column_names(rows[0])}",
        )
    name = source.spec.format
    if name is None or name == "auto":
        if not rows:  # every row is bad and will be reported, so that the format does not matter
            return DetectedFormat(TASK_FORMATS[task][0], "no readable rows", columns)
        detected = formats.detect_format(
            [location for location, _ in valid], [formats.rename_columns(row, columns) for row in rows], task
        )
        why = "each line of a .txt file is a row" if source.names[0].endswith(".txt") else detected.why
        return detected._replace(why=why, columns={**columns, **detected.columns})
    known = FORMATS[name]
    names = (*known.required, *known.optional)
    if unknown := [column for column in columns if column not in names]:
        raise LoraError(
            f"data.columns: format {name} has no column {unknown[0]}",
            hint=f"its columns are {', '.join(names)}; data.columns maps format columns to file columns",
        )
    return DetectedFormat(name, "set in the recipe", columns)


def _parsed_rows(
    records: Iterator[Record], format_: DetectedFormat, turns: TurnOptions, ignored: Counter[str]
) -> Iterator[ParsedRow]:
    known = {*FORMATS[format_.name].required, *FORMATS[format_.name].optional}
    for file, line, row, nulls in records:
        if isinstance(row, BadRow):
            yield ParsedRow(file, line, row)
            continue
        renamed = formats.rename_columns(row, format_.columns)
        ignored.update(renamed.keys() - known)
        try:
            if unreadable := [value for name, value in renamed.items() if name in known and isinstance(value, BadRow)]:
                raise unreadable[0]
            yield ParsedRow(file, line, formats.parse_row(renamed, format_.name, turns), nulls)
        except BadRow as bad:
            yield ParsedRow(file, line, bad)


class BadRows:
    """The bad rows of one source: the first ones for messages, and the number of all by reason."""

    def __init__(self) -> None:
        self.first: list[Finding] = []
        self.reasons: Counter[str] = Counter()
        self._hints: dict[str, str] = {}  # by reason

    def add(self, location: str, bad: BadRow) -> None:
        if len(self.first) < MAX_FINDINGS:
            self.first.append(Finding(location, bad))
        self.reasons[bad.reason] += 1
        if bad.hint is not None:
            self._hints.setdefault(bad.reason, bad.hint)

    def error(self, source: DataSource, task: TaskName, *, read: int) -> LoraError:
        """Return the error for a source with bad rows; `read` is the number of all its rows."""
        total = self.reasons.total()
        [(reason, _)] = self.reasons.most_common(1)
        hint = self._hints.get(reason, "fix them, or set data.on_bad_row: skip to drop and count them")
        if self.reasons.keys() == {"missing field"} and total == read:
            hint = f"map the columns with data.columns, for example {formats.COLUMN_EXAMPLES[task]}"
            if (other := _detected_name(source, task)) not in (None, source.spec.format):
                hint = f"the rows look like {other}: set format: auto"
        return findings_error(
            f"{source.name}: {total:,} of {read:,} rows {'is' if total == 1 else 'are'} bad",
            self.first,
            total,
            hint=hint,
        )


def check_documents(found: Sequence[DataSource], spec: DataSpec, task: TaskName) -> None:
    """Check that data.overlong: split has documents to split.

    Raises:
        LoraError: no source has rows of format text, or a source cannot be read.
    """
    if spec.overlong != "split":
        return
    names = [open_source(source, task, TurnOptions()).format.name for source in found]
    if "text" not in names:
        raise LoraError(
            f"data.overlong: split is for documents, but {found[0].name} has rows of format {names[0]}", hint=SPLIT_HINT
        )


def _detected_name(source: DataSource, task: TaskName) -> str | None:
    """Return the name of the format that `auto` detects, None if it detects none."""
    with suppress(LoraError):
        return open_source(
            source._replace(spec=source.spec.model_copy(update={"format": "auto"})), task, TurnOptions()
        ).format.name
    return None


class SourceCheck(NamedTuple):
    """The result of parsing a source without a tokenizer."""

    source: str
    format: str
    read: int
    bad: dict[str, int]  # by reason
    notes: list[str]  # what was changed in conversations


def check_rows(
    spec: DataSpec, task: TaskName, info: Callable[[str], None], *, cache: Path | None = None
) -> list[SourceCheck]:
    """Parse every row of every source, without tokenizing it. `cache`: as in `sources.train_sources`.

    Raises:
        LoraError: a source cannot be read, or has bad rows and data.on_bad_row is error.
    """
    results = []
    train = sources.train_sources(spec, cache=cache, info=info)
    found = [*train, *sources.eval_sources(spec, train, cache=cache, info=info)]
    check_documents(found, spec, task)
    for source in found:
        reader = open_source(source, task, turn_options(spec))
        info(f"{source.name}: format {reader.format.name} ({reader.format.why})")
        read, bad, tally = 0, BadRows(), Tally()
        for row in reader.rows:
            read += 1
            if isinstance(row.example, BadRow):
                bad.add(row_location(source, row), row.example)
            elif isinstance(row.example, Conversation):
                tally.add_conversation(row.example)
        if bad.first and spec.on_bad_row == "error":
            raise bad.error(source, task, read=read)
        for finding in bad.first:
            info(f"skipped {finding}")
        notes = [f"{count:,} {note}" for note, count in conversation_notes(tally).items() if count]
        results.append(SourceCheck(source.name, reader.format.name, read, dict(bad.reasons), notes))
    return results
