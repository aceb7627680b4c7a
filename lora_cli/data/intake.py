"""Read a source's rows in its format, bad ones included. No tokenizer, no torch: what `lora check --no-model` does."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple

from lora_cli.data import formats, sources
from lora_cli.data.formats import DETECTED_ON, FORMATS, Detected, Example
from lora_cli.data.records import LISTED, BadRow, Finding, Record, refuse
from lora_cli.data.sources import Source
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TASK_FORMATS, TaskName

LOOKED_AT = 1024  # rows, good and bad, that a format is detected on at most


class Item(NamedTuple):
    """One row of a source, read."""

    file: int
    line: int
    example: Example | BadRow


class Intake(NamedTuple):
    """A source whose format is known, ready to be read once."""

    format: Detected
    items: Iterator[Item]
    ignored: Counter[str]  # columns that the format does not read, and in how many rows; counted while reading


def opened(source: Source, task: TaskName) -> Intake:
    """Starts reading a source: looks at its first rows, and settles its format, one of the task, and its columns.

    Raises:
        LoraError: no row, no known format, or columns to rename that are not there.
    """
    stream = sources.records(source)
    first: list[Record] = []
    good: list[tuple[str, dict[str, Any]]] = []
    for record in islice(stream, LOOKED_AT):
        first.append(record)
        if not isinstance(record.row, BadRow):
            good.append((where(source, record), record.row))
            if len(good) == DETECTED_ON:
                break
    format_ = _settled(source, good, task)
    ignored: Counter[str] = Counter()
    return Intake(format_, _items(chain(first, stream), format_, ignored), ignored)


def where(source: Source, place: Record | Item) -> str:
    """`data/train.jsonl:17`, for messages."""
    return f"{source.names[place.file]}:{place.line}"


def _settled(source: Source, good: list[tuple[str, dict[str, Any]]], task: TaskName) -> Detected:
    columns = source.spec.columns
    rows = [row for _, row in good]
    if lost := [column for column in columns.values() if rows and not any(column in row for row in rows)]:
        raise LoraError(
            f"data.columns: {source.name} has no column {lost[0]}", hint=f"its columns are {formats.listed(rows[0])}"
        )
    name = source.spec.format
    if name is None or name == "auto":
        if not rows:  # every row is bad, and will be reported as such: any format will do
            return Detected(TASK_FORMATS[task][0], "no row can be read", columns)
        found = formats.detect([place for place, _ in good], [formats.rename(row, columns) for row in rows], task)
        why = "each line of a .txt file is a row" if source.names[0].endswith(".txt") else found.why
        return found._replace(why=why, columns={**columns, **found.columns})
    known = FORMATS[name]
    names = (*known.required, *known.optional)
    if strange := [column for column in columns if column not in names]:
        raise LoraError(
            f"data.columns: format {name} has no column {strange[0]}",
            hint=f"it reads {', '.join(names)}; the key is the format's name, the value the file's",
        )
    return Detected(name, "set in the recipe", columns)


def _items(records: Iterator[Record], format_: Detected, ignored: Counter[str]) -> Iterator[Item]:
    known = {*FORMATS[format_.name].required, *FORMATS[format_.name].optional}
    for file, line, row in records:
        if isinstance(row, BadRow):
            yield Item(file, line, row)
            continue
        named = formats.rename(row, format_.columns)
        ignored.update(named.keys() - known)
        try:
            yield Item(file, line, formats.read(named, format_.name))
        except BadRow as bad:
            yield Item(file, line, bad)


class BadRows:
    """The bad rows of one source: the first few for the user to see, all of them counted by reason."""

    def __init__(self) -> None:
        self.first: list[Finding] = []
        self.reasons: Counter[str] = Counter()

    def add(self, place: str, bad: BadRow) -> None:
        if len(self.first) < LISTED:
            self.first.append(Finding(place, bad))
        self.reasons[bad.reason] += 1

    def refusal(self, source: Source, task: TaskName, *, read: int) -> LoraError:
        """The error of a source that has bad rows and may not."""
        total = self.reasons.total()
        hint = "mend them, or set data.on_bad_row: skip to leave them out, counted"
        if self.reasons.keys() == {"missing field"} and total == read:
            hint = f"map the columns, as in data.columns: {formats.MAPPED[task]}"
            if (other := _looks_like(source, task)) not in (None, source.spec.format):
                hint = f"they look like {other}: write format: auto"
        return refuse(
            f"{source.name}: {total:,} of {read:,} rows {'is' if total == 1 else 'are'} bad",
            self.first,
            total,
            hint=hint,
        )


def _looks_like(source: Source, task: TaskName) -> str | None:
    """The format that auto would find."""
    with suppress(LoraError):
        return opened(source._replace(spec=source.spec.model_copy(update={"format": "auto"})), task).format.name
    return None


class Checked(NamedTuple):
    """What reading a source without a tokenizer showed."""

    source: str
    format: str
    read: int
    bad: dict[str, int]  # by reason


def read_only_check(spec: DataSpec, task: TaskName, info: Callable[[str], None]) -> list[Checked]:
    """Reads every row of every source in its format, without encoding any.

    Raises:
        LoraError: there are bad rows, and data.on_bad_row is error.
    """
    results = []
    for source in [*sources.train_sources(spec), *sources.eval_sources(spec)]:
        intake = opened(source, task)
        info(f"{source.name}: format {intake.format.name} ({intake.format.why})")
        read, bad = 0, BadRows()
        for item in intake.items:
            read += 1
            if isinstance(item.example, BadRow):
                bad.add(where(source, item), item.example)
        if bad.first and spec.on_bad_row == "error":
            raise bad.refusal(source, task, read=read)
        for finding in bad.first:
            info(f"skipped {finding}")
        results.append(Checked(source.name, intake.format.name, read, dict(bad.reasons)))
    return results
