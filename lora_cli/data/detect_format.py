"""Detect the format of a source from its first rows, for `format: auto`. Pure: no tokenizer, no torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_cli.data.column_hints import mapping_hint
from lora_cli.data.formats import FORMATS, RawRow, column_names
from lora_cli.data.records import BadRow
from lora_cli.data.row_kinds import check_row_kind
from lora_cli.errors import LoraError
from lora_cli.recipe.tasks import TASK_FORMATS, FormatName, TaskName

DETECTION_ROWS = 32  # valid rows from which `format: auto` detects the format


class DetectedFormat(NamedTuple):
    """The format of a source and the reason for it."""

    name: FormatName
    why: str
    columns: dict[str, str | None]  # column names to change, in the form of data.columns


def detect_format(
    locations: Sequence[str],
    rows: Sequence[RawRow],
    task: TaskName = "causal-lm",
    *,
    columns: Mapping[str, str | None] | None = None,
    has_template: bool | None = None,
) -> DetectedFormat:
    """Return the one format of the task that fits the first rows of a source.

    Args:
        locations: of the rows, for messages.
        rows: with columns renamed.
        task: of the recipe.
        columns: data.columns of the source.
        has_template: whether the model's tokenizer has a chat template; None if it is not known.

    Raises:
        LoraError: no format fits, or the rows have different formats.
    """
    detected = [(location, row, _detect_one(row, task)) for location, row in zip(locations, rows, strict=True)]
    # Rows without a known format are ignored here: they are reported as bad rows when they are parsed.
    known = [(location, row, name) for location, row, name in detected if name is not None]
    if not known:
        raise _unknown_format(locations[0], rows[0], task, columns or {}, has_template)
    first_location, row, first = known[0]
    for location, _, name in known:
        if name != first:
            raise LoraError(
                f"data: rows have different formats: {first_location} looks like {first}, {location} like {name}",
                hint="set data.format, or list the rows of each format as a separate source",
            )
    if first == "messages" and "messages" not in row:
        return DetectedFormat("messages", "role and content in column conversations", {"messages": "conversations"})
    present = [column for column in (*FORMATS[first].required, *FORMATS[first].optional) if column in row]
    return DetectedFormat(first, f"its rows have {' + '.join(present)}", {})


def _unknown_format(
    location: str, row: RawRow, task: TaskName, columns: Mapping[str, str | None], has_template: bool | None
) -> LoraError:
    """Return the error for rows that no format fits."""
    try:
        check_row_kind(row, unread=row, format_=None, columns=columns)
    except BadRow as bad:
        return LoraError(f"{location}: {bad.field}: {bad.problem}", hint=bad.hint)
    return LoraError(
        f"{location}: no known format has these columns: {column_names(row)}",
        hint=mapping_hint(row, task, has_template=has_template),
    )


def _detect_one(row: RawRow, task: TaskName) -> FormatName | None:
    turns = row.get("conversations") if task == "causal-lm" else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return "messages"
    candidates = (name for name in FORMATS if name in TASK_FORMATS[task])
    return next((name for name in candidates if all(c in row for c in FORMATS[name].required)), None)
