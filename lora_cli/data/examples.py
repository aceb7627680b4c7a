"""Parse the rows of a dataset source, for encoding and for `lora check --no-model`. No tokenizer, no torch."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.data import formats, sources
from lora_cli.data.column_hints import missing_column_hint
from lora_cli.data.conversation import Conversation
from lora_cli.data.detect_format import DETECTION_ROWS, DetectedFormat, detect_format
from lora_cli.data.formats import FORMATS, MISSING, Example, RawRow
from lora_cli.data.ledger import Tally, check_dropped_share, conversation_notes, null_lines
from lora_cli.data.message_shapes import MessageNames, NormalizedMessages, normalize_messages, unread_keys
from lora_cli.data.readers import parse_json_field
from lora_cli.data.records import MAX_FINDINGS, BadRow, Finding, Record, findings_error
from lora_cli.data.row_kinds import check_media, check_row_kind, is_empty
from lora_cli.data.row_size import check_size
from lora_cli.data.row_variables import KWARGS_COLUMN, row_variables
from lora_cli.data.sources import DataSource
from lora_cli.data.turns import TurnOptions
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TASK_FORMATS, FormatName, TaskName

SPLIT_HINT = "only rows of format text can be split: set data.overlong to drop or truncate, or raise data.max_length"
NO_ROWS_HINT = "check data.on_bad_row, data.overlong and the weights"
MAX_DETECTION_ROWS = 1024  # largest number of rows, valid or not, that are read to detect the format
TEMPLATE_KEYS = {"name"}  # keys of messages that chat templates may read: they are not listed without a model


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
    unread: "Unread"  # counted while reading


class Unread(NamedTuple):
    """What the rows of a source have and nothing reads; columns and keys without a value are not counted."""

    columns: Counter[str]  # rows by column
    keys: Counter[str]  # messages by key; a chat template may read it


def open_source(
    source: DataSource, task: TaskName, turns: TurnOptions, *, has_template: bool | None = None, skip: int = 0
) -> SourceReader:
    """Open a source for reading, and choose its format and columns from its first rows.

    Args:
        source: of the recipe.
        task: of the recipe.
        turns: how turns that are not in the usual order are handled.
        has_template: whether the tokenizer has a chat template, for hints; None if it is not known.
        skip: rows to leave out, the first of the source.

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
    format_ = _resolve_format(source, valid, task, has_template)
    names = MessageNames(source.spec.message_fields, source.spec.roles)
    unread = Unread(Counter(), Counter())
    rows = islice(chain(first, stream), skip, None)
    parsed = _parsed_rows(rows, format_, names, turns, unread, variables=source.spec.template_variables)
    return SourceReader(format_, parsed, unread)


def turn_options(spec: DataSpec) -> TurnOptions:
    """Return how a recipe handles turns that are not in the usual order."""
    return TurnOptions(join=spec.merge_turns, cut_end=spec.on_bad_row == "skip")


def row_location(source: DataSource, row: Record | ParsedRow) -> str:
    """Return the file and line of a row for messages: `data/train.jsonl:17`."""
    return f"{source.names[row.file]}:{row.line}"


def _resolve_format(
    source: DataSource, valid: list[tuple[str, dict[str, Any]]], task: TaskName, has_template: bool | None
) -> DetectedFormat:
    columns = source.spec.columns
    rows = [row for _, row in valid]
    mapped = [column for column in columns.values() if column is not None]
    if missing := [column for column in mapped if rows and not any(column in row for row in rows)]:
        raise LoraError(
            f"data.columns: {source.name} has no column {missing[0]}",
            hint=f"its columns are {formats.column_names(rows[0])}",
        )
    name = source.spec.format
    if name is None or name == "auto":
        if not rows:  # every row is bad and will be reported, so that the format does not matter
            return DetectedFormat(TASK_FORMATS[task][0], "no readable rows", columns)
        detected = detect_format(
            [location for location, _ in valid],
            [rename_columns(row, columns) for row in rows],
            task,
            columns=columns,
            has_template=has_template,
        )
        why = "each line of a .txt file is a row" if source.names[0].endswith(".txt") else detected.why
        return detected._replace(why=why, columns={**columns, **detected.columns})
    known = FORMATS[name]
    names = (*known.required, *known.optional)
    if unknown := [column for column, mapped_to in columns.items() if column not in names and mapped_to is not None]:
        raise LoraError(
            f"data.columns: format {name} has no column {unknown[0]}",
            hint=f"its columns are {', '.join(names)}; data.columns maps format columns to file columns",
        )
    return DetectedFormat(name, "set in the recipe", columns)


def rename_columns(row: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Return `row` with its columns renamed to those of the format.

    `columns` maps a column of the format to one of the file, or a column of the file to None: it is left out.
    """
    if not columns:
        return row
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{name: row[column] for name, column in columns.items() if column is not None and column in row}}


class NormalizedRow(NamedTuple):
    """A row whose messages have the form of chat templates."""

    row: RawRow
    lists: dict[str, NormalizedMessages]  # by column

    def field_in_file(self, field: str | None) -> str | None:
        """Return a field of the row with the index and key that the file has."""
        for column, messages in self.lists.items():
            field = messages.field_in_file(field, column) if field else None
        return field


def normalize_row(row: RawRow, name: FormatName, names: MessageNames) -> NormalizedRow:
    """Return `row` with the messages of its format normalized.

    Raises:
        BadRow: a role is unknown, or a tool call cannot be read.
    """
    lists: dict[str, NormalizedMessages] = {}
    literal = name == "prompt-completion" and not all(
        _is_message_text(row.get(each)) for each in FORMATS[name].required
    )
    for column in FORMATS[name].messages:
        value = row.get(column)
        if isinstance(value, str) and value.strip() and not literal:
            value = parse_json_field(value, field=column)
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            lists[column] = normalize_messages(value, field=column, names=names)
    return NormalizedRow({**row, **{column: each.messages for column, each in lists.items()}}, lists)


def _is_message_text(value: object) -> bool:
    """Return whether a text is the JSON of a list of messages, as in tables."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    with suppress(BadRow):
        messages = parse_json_field(value, field="")
        return bool(messages) and all(isinstance(each, dict) and {"role", "from"} & each.keys() for each in messages)
    return False


def _parsed_rows(
    records: Iterator[Record],
    format_: DetectedFormat,
    names: MessageNames,
    turns: TurnOptions,
    unread: Unread,
    *,
    variables: Mapping[str, Any],
) -> Iterator[ParsedRow]:
    known = {*FORMATS[format_.name].required, *FORMATS[format_.name].optional}
    for file, line, row, nulls in records:
        if isinstance(row, BadRow):
            yield ParsedRow(file, line, row)
            continue
        renamed = rename_columns(row, format_.columns)
        others = renamed.keys() - known - {KWARGS_COLUMN}
        unread.columns.update(name for name in others if not is_empty(renamed[name]))
        try:
            if unreadable := [value for name, value in renamed.items() if name in known and isinstance(value, BadRow)]:
                raise unreadable[0]
            check_row_kind(renamed, unread=others, format_=format_.name, columns=format_.columns)
            example, keys = _parse(renamed, format_.name, names, turns)
            check_size(example)
            check_media(example, columns=format_.columns)
            unread.keys.update(keys)
            if isinstance(example, Conversation):
                # A row's own variables take precedence over those of its source.
                own = row_variables(renamed.get(KWARGS_COLUMN))
                example = example._replace(variables={**variables, **own})
            elif KWARGS_COLUMN in renamed:
                unread.columns[KWARGS_COLUMN] += 1
            yield ParsedRow(file, line, example, nulls)
        except BadRow as bad:
            yield ParsedRow(file, line, bad)


def _parse(row: RawRow, name: FormatName, names: MessageNames, turns: TurnOptions) -> tuple[Example, Counter[str]]:
    """Return the example of a row, and the number of its messages by key that nothing reads."""
    normalized = normalize_row(row, name, names)
    try:
        example = formats.parse_row(normalized.row, name, turns)
    except BadRow as bad:
        bad.field = normalized.field_in_file(bad.field)
        if bad.reason == MISSING:
            bad.hint = missing_column_hint(row, name)
        raise
    keys = unread_keys(example.messages) if isinstance(example, Conversation) else Counter()
    for messages in normalized.lists.values():
        keys.update(messages.unread)
    return example, keys


class BadRows:
    """The bad rows of one source: the first ones for messages, and the number of all by reason."""

    def __init__(self) -> None:
        self.first: list[Finding] = []
        self.reasons: Counter[str] = Counter()
        self.hints: dict[str, str] = {}  # by reason

    def add(self, location: str, bad: BadRow) -> None:
        if len(self.first) < MAX_FINDINGS:
            self.first.append(Finding(location, bad))
        self.reasons[bad.reason] += 1
        if bad.hint is not None:
            self.hints.setdefault(bad.reason, bad.hint)  # the first: a hint about columns names those of its row

    def error(self, source: DataSource, task: TaskName, *, read: int) -> LoraError:
        """Return the error for a source with bad rows; `read` is the number of all its rows."""
        total = self.reasons.total()
        [(reason, _)] = self.reasons.most_common(1)
        hint = self.hints.get(reason, "fix them, or set data.on_bad_row: skip to drop and count them")
        other = _detected_name(source, task) if reason == MISSING and total == read else None
        if other not in (None, source.spec.format):
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
    notes: list[str]  # what was changed in the rows
    unread_columns: dict[str, int]  # rows by column
    unread_keys: dict[str, int]  # messages by key


def check_rows(
    spec: DataSpec, task: TaskName, info: Callable[[str], None], *, cache: Path | None = None, complete: bool = True
) -> list[SourceCheck]:
    """Parse every row of every source, without tokenizing it.

    Args:
        spec: the recipe's data section.
        task: of the recipe.
        info: prints a progress message.
        cache: as in `sources.train_sources`.
        complete: whether the recipe has no other sources, so that data.max_loss can be checked.

    Raises:
        LoraError: a source cannot be read, or has bad rows and data.on_bad_row is error, or more than data.max_loss.
    """
    results, tallies = [], []
    train = sources.train_sources(spec, cache=cache, info=info)
    found = [*train, *sources.eval_sources(spec, train, cache=cache, info=info)]
    check_documents(found, spec, task)
    for source in found:
        reader = open_source(source, task, turn_options(spec))
        info(f"{source.name}: format {reader.format.name} ({reader.format.why})")
        bad, tally = BadRows(), Tally()
        for row in reader.rows:
            tally.read += 1
            if isinstance(row.example, BadRow):
                bad.add(row_location(source, row), row.example)
                continue
            tally.nulls.update(row.nulls)
            if isinstance(row.example, Conversation):
                tally.add_conversation(row.example)
        tally.dropped = bad.reasons
        tallies.append(tally)
        if bad.first and spec.on_bad_row == "error":
            raise bad.error(source, task, read=tally.read)
        for finding in bad.first:
            info(f"skipped {finding}")
        notes = [f"{count:,} {note}" for note, count in conversation_notes(tally).items() if count] + null_lines(tally)
        keys = {key: count for key, count in sorted(reader.unread.keys.items()) if key not in TEMPLATE_KEYS}
        columns = dict(sorted(reader.unread.columns.items()))
        results.append(
            SourceCheck(source.name, reader.format.name, tally.read, dict(bad.reasons), notes, columns, keys)
        )
    if complete:
        check_dropped_share(tallies, spec)
        if all(tally.read == tally.dropped.total() for tally in tallies[: len(train)]):
            raise LoraError("data.train: no rows are left", hint=NO_ROWS_HINT)
    return results
