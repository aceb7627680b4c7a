"""Read tables of cells (CSV, TSV) row by row, with line numbers. No tokenizer, no torch."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any, TextIO

from lora_cli.data.data_file import DataFile
from lora_cli.data.readers import MAX_LINE, quote, too_long_row
from lora_cli.data.records import BadRow, Line
from lora_cli.errors import LoraError, first_line

OTHER_DELIMITERS = (",", ";", "\t", "|")


def read_csv(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a file of cells with a header line, separated by the file's delimiter, else by commas.

    Raises:
        LoraError: the header or the quotes are wrong.
    """
    return _read_cells(file, file.delimiter or ",")


def read_tsv(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a file of cells with a header line, separated by the file's delimiter, else by tabs.

    Raises:
        LoraError: the header or the quotes are wrong.
    """
    return _read_cells(file, file.delimiter or "\t")


def _read_cells(file: DataFile, delimiter: str) -> Iterator[Line]:
    # The default, 128 KiB per cell, is too small for a long document. A quote that is not closed makes a cell of the
    # rest of the file.
    csv.field_size_limit(MAX_LINE)
    with file.open() as content:
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        cells = csv.reader(_unix_line_ends(file.name, lines), strict=True, delimiter=delimiter)
        header: list[str] = []
        line = 1
        try:
            for row in cells:
                start, line = line, cells.line_num + 1
                if not row:
                    continue
                if not header:
                    header = _header(file.name, row, delimiter)
                    continue
                yield Line(start, _csv_row(header, row))
        except csv.Error as error:
            raise LoraError(
                f"{file.name}:{line}: malformed CSV: {first_line(error)}",
                hint='the rows after it cannot be read: fix the quotes (a quote in a quoted cell is written "")',
            ) from None


def _unix_line_ends(name: str, lines: TextIO) -> Iterator[str]:
    """Replace CRLF, also within quoted cells, if the first line ends with it: the text is the same as with LF."""
    first = lines.readline(MAX_LINE)
    crlf = first.endswith("\r\n")
    line, number = first, 1
    while line:
        if len(line) == MAX_LINE:
            raise too_long_row(name, number)
        yield line.replace("\r\n", "\n") if crlf else line
        line, number = lines.readline(MAX_LINE), number + 1


def _header(name: str, names: list[str], delimiter: str) -> list[str]:
    problems = [f"the column {quote(name)} occurs twice" for name in names if names.count(name) > 1]
    problems += [f"column {i} has no name" for i, name in enumerate(names, 1) if not name.strip()]
    problems += ["the names are not UTF-8" for name in names if re.search("[\ud800-\udfff]", name)]
    if problems:
        raise LoraError(f"{name}:1: {problems[0]}", hint="the first line of the file must name every column once")
    if len(names) == 1 and (found := [other for other in OTHER_DELIMITERS if other in names[0]]):
        raise LoraError(
            f"{name}:1: separated by {quote(delimiter)}, the header is one column: {quote(names[0])}",
            hint=f"set the delimiter of the source: data.train: [{{path: ..., delimiter: {_yaml_string(found[0])}}}]",
        )
    return names


def _yaml_string(delimiter: str) -> str:
    return '"\\t"' if delimiter == "\t" else f'"{delimiter}"'


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any] | BadRow:
    if len(row) != len(header):
        return BadRow("wrong number of cells", f"cells: {len(row)} here, {len(header)} in the header")
    values = dict(zip(header, row, strict=True))
    for name, cell in values.items():
        if "\0" in cell:
            return BadRow("NUL byte", "contains a NUL byte", field=name)
        if match := re.search("[\ud800-\udfff]", cell):
            return BadRow("not UTF-8", f"is not UTF-8: byte 0x{ord(match[0]) - 0xDC00:02x}", field=name)
    return values
