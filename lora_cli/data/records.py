"""Dataset rows as read from a file, with file and line, or as a `BadRow` with its reason. No tokenizer, no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_cli.errors import LoraError

MAX_FINDINGS = 5  # findings listed in a message; the rest are counted


class BadRow(Exception):
    """A row that cannot be used. Raised, or returned in place of the row, by the stage that detects the problem.

    Attributes:
        reason: fixed words that the ledger counts rows by: `unknown role`.
        problem: one line about this row: `'asistant' is not a role: did you mean assistant?`.
        field: the field with the problem, `messages[1].role`, or None for the full row.
        hint: what to do, if it is not to fix the row or to skip it.
    """

    def __init__(self, reason: str, problem: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(reason, problem)  # both, for pickle
        self.reason = reason
        self.problem = problem
        self.field = field
        self.hint = hint


class Line(NamedTuple):
    """One raw row of a data file, as its reader yields it."""

    number: int  # 1-based: line of a text file, row of a table
    # The row, or why it cannot be used. In a row of a table, the value of a column that cannot be used is a BadRow.
    row: dict[str, Any] | BadRow
    nulls: Sequence[str] = ()  # fields that were null in structs of an Arrow table, and dropped


class Record(NamedTuple):
    """One raw row of a source."""

    file: int  # index into the source's names
    line: int  # 1-based: line of a text file, row of a table
    row: dict[str, Any] | BadRow
    nulls: Sequence[str] = ()  # as in Line


class Finding(NamedTuple):
    """A bad row and its location."""

    where: str  # `data/train.jsonl:17`
    bad: BadRow

    def __str__(self) -> str:
        field = f"{self.bad.field}: " if self.bad.field else ""
        return f"{self.where}: {field}{self.bad.problem}"


def findings_error(message: str, findings: Sequence[object], total: int, *, hint: str) -> LoraError:
    """Return an error that lists the first findings and counts the rest; `total` is the number of all findings."""
    details = [str(finding) for finding in findings[:MAX_FINDINGS]]
    if total > len(details):
        details.append(f"... and {total - len(details):,} more")
    return LoraError(message, hint=hint, details=details)
