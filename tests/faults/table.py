"""The table of fault campaigns in a Markdown file: what was tried, survived and lost."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.faults.campaign import Result
from tests.faults.campaigns import campaigns

PACKAGES = ("torch", "transformers", "peft", "safetensors", "pyarrow")
VERDICTS = ("survived", "lost", "traceback", "silent", "hang")
MARKS = ("<!-- faults: begin -->", "<!-- faults: end -->")  # around the table in a Markdown file


class Row(NamedTuple):
    """The figures of one campaign."""

    key: str
    title: str
    results: list[Result]

    def count(self, verdict: str) -> int:
        """Return the number of cases with a verdict."""
        return sum(result.outcome.verdict == verdict for result in self.results)

    @property
    def tried(self) -> int:
        """The number of cases whose fault occurred."""
        return len(self.results) - self.count("not tried")


def table_rows(rows: Sequence[Row], seed: int) -> dict[str, str]:
    """Return a row of the Markdown table for each campaign, by its title."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return {
        row.title: _table_row(row.title, [row.tried, *(row.count(verdict) for verdict in VERDICTS)], today, str(seed))
        for row in rows
    }


def _table_row(*cells: str | list[int]) -> str:
    flat = [cell for part in cells for cell in ([part] if isinstance(part, str) else [f"{n:,}" for n in part])]
    return f"| {' | '.join(flat)} |"


def render(rows: Mapping[str, str]) -> str:
    """Return the Markdown table of the rows, with their sum and the versions of the libraries."""
    figures = [[int(cell.replace(",", "")) for cell in row.split("|")[2 : 3 + len(VERDICTS)]] for row in rows.values()]
    totals = [f"**{sum(column):,}**" for column in zip(*figures, strict=True)]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            f"| kind | tried | {' | '.join(VERDICTS)} | date | seed |",
            f"|---|{'--:|' * (len(VERDICTS) + 1)}---|--:|",
            *rows.values(),
            f"| **all** | {' | '.join(totals)} | | |",
            "",
            f"Python {sys.version.split()[0]}, {versions}.",
            "",
        ]
    )


def write_table(file: Path, rows: Mapping[str, str]) -> None:
    """Put rows into the table between MARKS of a Markdown file, which is made if it does not exist.

    Rows of other campaigns stay: a complete run can be made of several.

    Raises:
        SystemExit: the file exists without MARKS.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else "\n".join([*MARKS, ""])
    before, begin, rest = text.partition(MARKS[0])
    old, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"{file} has no lines {MARKS[0]} and {MARKS[1]}")
    known = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")} | dict(rows)
    titles = [campaign.title for campaign in campaigns(quick=False).values()]
    table = render({title: known[title] for title in titles if title in known})
    file.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")
