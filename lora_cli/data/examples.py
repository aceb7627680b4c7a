"""Read a source's rows in its format, bad ones included. No tokenizer, no torch: what `lora check --no-model` does."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple

from lora_cli.data import formats, sources
from lora_cli.data.formats import DETECTION_ROWS, FORMATS, DetectedFormat, Example
from lora_cli.data.records import MAX_FINDINGS, BadRow, Finding, Record, findings_error
from lora_cli.data.sources import DataSource
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TASK_FORMATS, TaskName

MAX_DETECTION_ROWS = 1024  # rows, good and bad, that a format is detected on at most


class ParsedRow(NamedTuple):
    """One row of a source, read."""

    file: int
    line: int
    example: Example | BadRow


class SourceReader(NamedTuple):
    """A source whose format is known, ready to be read once."""

    format: DetectedFormat
    items: Iterator[ParsedRow]
    ignored: Counter[str]  # columns that the format does not read, and in how many rows; counted while reading


def open_source(source: DataSource, task: TaskName) -> SourceReader:
    """Starts reading a source: looks at its first rows, and settles its format, one of the task, and its columns.

    Raises:
        LoraError: no row, no known format, or columns to rename that are not there.
    """
    stream = sources.read_records(source)
    first: list[Record] = []
    good: list[tuple[str, dict[str, Any]]] = []
    for record in islice(stream, MAX_DETECTION_ROWS):
        first.append(record)
        if not isinstance(record.row, BadRow):
            good.append((row_location(source, record), record.row))
            if len(good) == DETECTION_ROWS:
                break
    format_ = _resolve_format(source, good, task)
    ignored: Counter[str] = Counter()
    return SourceReader(format_, _parsed_rows(chain(first, stream), format_, ignored), ignored)


def row_location(source: DataSource, place: Record | ParsedRow) -> str:
    """`data/train.jsonl:17`, for messages."""
    return f"{source.names[place.file]}:{place.line}"


def _resolve_format(source: DataSource, good: list[tuple[str, dict[str, Any]]], task: TaskName) -> DetectedFormat:
    columns = source.spec.columns
    rows = [row for _, row in good]
    if lost := [column for column in columns.values() if rows and not any(column in row for row in rows)]:
        raise LoraError(
            f"data.columns: {source.name} has no column {lost[0]}",
            hint=f"its columns are {formats.column_names(rows[0])}",
        )
    name = source.spec.format
    if name is None or name == "auto":
        if not rows:  # every row is bad, and will be reported as such: any format will do
            return DetectedFormat(TASK_FORMATS[task][0], "no row can be read", columns)
        found = formats.detect_format(
            [place for place, _ in good], [formats.rename_columns(row, columns) for row in rows], task
        )
        why = "each line of a .txt file is a row" if source.names[0].endswith(".txt") else found.why
        return found._replace(why=why, columns={**columns, **found.columns})
    known = FORMATS[name]
    names = (*known.required, *known.optional)
    if strange := [column for column in columns if column not in names]:
        raise LoraError(
            f"data.columns: format {name} has no column {strange[0]}",
            hint=f"it reads {', '.join(names)}; the key is the format's name, the value the file's",
        )
    return DetectedFormat(name, "set in the recipe", columns)


def _parsed_rows(records: Iterator[Record], format_: DetectedFormat, ignored: Counter[str]) -> Iterator[ParsedRow]:
    known = {*FORMATS[format_.name].required, *FORMATS[format_.name].optional}
    for file, line, row in records:
        if isinstance(row, BadRow):
            yield ParsedRow(file, line, row)
            continue
        named = formats.rename_columns(row, format_.columns)
        ignored.update(named.keys() - known)
        try:
            yield ParsedRow(file, line, formats.parse_row(named, format_.name))
        except BadRow as bad:
            yield ParsedRow(file, line, bad)


class BadRows:
    """The bad rows of one source: the first few for the user to see, all of them counted by reason."""

    def __init__(self) -> None:
        self.first: list[Finding] = []
        self.reasons: Counter[str] = Counter()

    def add(self, place: str, bad: BadRow) -> None:
        if len(self.first) < MAX_FINDINGS:
            self.first.append(Finding(place, bad))
        self.reasons[bad.reason] += 1

    def refusal(self, source: DataSource, task: TaskName, *, read: int) -> LoraError:
        """The error of a source that has bad rows and may not."""
        total = self.reasons.total()
        hint = "mend them, or set data.on_bad_row: skip to leave them out, counted"
        if self.reasons.keys() == {"missing field"} and total == read:
            hint = f"map the columns, as in data.columns: {formats.COLUMN_EXAMPLES[task]}"
            if (other := _looks_like(source, task)) not in (None, source.spec.format):
                hint = f"they look like {other}: write format: auto"
        return findings_error(
            f"{source.name}: {total:,} of {read:,} rows {'is' if total == 1 else 'are'} bad",
            self.first,
            total,
            hint=hint,
        )


def _looks_like(source: DataSource, task: TaskName) -> str | None:
    """The format that auto would find."""
    with suppress(LoraError):
        return open_source(source._replace(spec=source.spec.model_copy(update={"format": "auto"})), task).format.name
    return None


class SourceCheck(NamedTuple):
    """What reading a source without a tokenizer showed."""

    source: str
    format: str
    read: int
    bad: dict[str, int]  # by reason


def check_rows(spec: DataSpec, task: TaskName, info: Callable[[str], None]) -> list[SourceCheck]:
    """Reads every row of every source in its format, without encoding any.

    Raises:
        LoraError: there are bad rows, and data.on_bad_row is error.
    """
    results = []
    for source in [*sources.train_sources(spec), *sources.eval_sources(spec)]:
        intake = open_source(source, task)
        info(f"{source.name}: format {intake.format.name} ({intake.format.why})")
        read, bad = 0, BadRows()
        for item in intake.items:
            read += 1
            if isinstance(item.example, BadRow):
                bad.add(row_location(source, item), item.example)
        if bad.first and spec.on_bad_row == "error":
            raise bad.refusal(source, task, read=read)
        for finding in bad.first:
            info(f"skipped {finding}")
        results.append(SourceCheck(source.name, intake.format.name, read, dict(bad.reasons)))
    return results
