"""What a source yields: a raw row with the file and line it came from, or the reason it is none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_cli.errors import LoraError

MAX_FINDINGS = 5  # findings shown one by one; the rest are counted


class BadRow(Exception):
    """One row that cannot be used; the source or the next stage that notices raises or stores it.

    Attributes:
        reason: a few fixed words that the ledger counts by, `unknown role`.
        problem: this row's finding in one line, `'asistant' is no role: did you mean 'assistant'?`.
        field: the field it is about, `messages[1].role`, or None for the row as a whole.
    """

    def __init__(self, reason: str, problem: str, *, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.problem = problem
        self.field = field


class Record(NamedTuple):
    """One row as its file holds it."""

    file: int  # index into the source's names
    line: int  # 1-based: line of a text file, row of a table
    row: dict[str, Any] | BadRow


class Finding(NamedTuple):
    """A bad row together with its place."""

    where: str
    bad: BadRow

    def __str__(self) -> str:
        field = f"{self.bad.field}: " if self.bad.field else ""
        return f"{self.where}: {field}{self.bad.problem}"


def findings_error(message: str, findings: Sequence[object], total: int, *, hint: str) -> LoraError:
    """The error that lists the first findings and counts the rest."""
    details = [str(finding) for finding in findings[:MAX_FINDINGS]]
    if total > len(details):
        details.append(f"... and {total - len(details):,} more")
    return LoraError(message, hint=hint, details=details)
