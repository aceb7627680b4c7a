"""Read tables (CSV, TSV, Parquet) row by row, with line or row numbers. No tokenizer, no torch."""

import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

from lora_cli.data.data_file import DataFile
from lora_cli.data.readers import quote
from lora_cli.data.records import BadRow, Line
from lora_cli.errors import LoraError

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
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB per cell, is too small for a long document
    with file.open() as content:
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        cells = csv.reader(_unix_line_ends(lines), strict=True, delimiter=delimiter)
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
                f"{file.name}:{line}: malformed CSV: {error}",
                hint='the rows after it cannot be read: fix the quotes (a quote in a quoted cell is written "")',
            ) from None


def _unix_line_ends(lines: Iterator[str]) -> Iterator[str]:
    """Replace CRLF, also within quoted cells, if the first line ends with it: the text is the same as with LF."""
    first = next(lines, "")
    crlf = first.endswith("\r\n")
    yield first.replace("\r\n", "\n") if crlf else first
    for line in lines:
        yield line.replace("\r\n", "\n") if crlf else line


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


def read_parquet(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a Parquet file, numbered from 1.

    Raises:
        LoraError: the file cannot be read, or has two columns of the same name.
    """
    # Imported here because pyarrow takes half a second to import, and most data is JSON.
    import pyarrow
    from pyarrow import parquet

    from lora_cli.data.arrow_rows import ArrowRows

    try:
        table = parquet.ParquetFile(file.path)
        rows = ArrowRows(table.schema_arrow, file.name)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row, nulls in rows.of_batch(batch):
                number += 1
                yield Line(number, row, nulls)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise LoraError(
            f"{file.name}: not a readable Parquet file: {first_line}", hint="write the file again"
        ) from None
