"""Read one data file row by row, with line numbers: a table from file suffix to generator. No tokenizer, no torch."""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError

CHUNK = 1 << 20  # characters of a .json array read at a time

BLANKS = re.compile(r"[ \t\r\n]*")

# A row of a file: its 1-based line, and the row or why it is none.
Line = tuple[int, dict[str, Any] | BadRow]


class ParsedJson(NamedTuple):
    """A JSON value, and what its syntax allows but a data row must not hold."""

    value: Any
    end: int
    flaw: BadRow | None


def parse_json(text: str, start: int = 0) -> ParsedJson:
    """The JSON value at `start`; unlike `json.loads`, repeated keys, NaN and infinity are noticed.

    Raises:
        json.JSONDecodeError: the text is no JSON.
    """
    flaws: list[BadRow] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            flaws.append(BadRow("repeated key", f"the key {quote(twice)} is there twice", field=twice))
        return found

    def constant(name: str) -> None:
        flaws.append(BadRow("NaN or infinity", f"{name} is not a JSON value"))

    try:
        value, end = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant).raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, start) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to convert numbers of thousands of digits
        raise json.JSONDecodeError("a number of too many digits", text, start) from None
    if not flaws and text.find("\\u", start, end) >= 0:
        flaws.extend(filter(None, [find_invalid_characters(value)]))
    return ParsedJson(value, end, flaws[0] if flaws else None)


def parse_json_field(text: str, *, field: str) -> Any:
    """The JSON value that a cell or string field holds; raises `BadRow` where it holds none."""
    try:
        parsed = parse_json(text.strip())
    except json.JSONDecodeError:
        raise BadRow("malformed JSON", "is a string that is no JSON", field=field) from None
    if parsed.end < len(text.strip()):
        raise BadRow("malformed JSON", "is a string that is no JSON", field=field)
    if parsed.flaw is not None:
        raise BadRow(parsed.flaw.reason, f"in its JSON text: {parsed.flaw.problem}", field=field)
    return parsed.value


def quote(value: object, limit: int = 40) -> str:
    """`value` as a short quoted text that is safe to print."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[0]


def find_invalid_characters(value: object, field: str = "") -> BadRow | None:
    """Characters that are legal in a JSON escape, but no text: lone surrogates and NUL."""
    if isinstance(value, dict):
        found = (
            find_invalid_characters(key, field) or find_invalid_characters(item, f"{field}.{key}" if field else key)
            for key, item in value.items()
        )
        return next(filter(None, found), None)
    if isinstance(value, list):
        return next(
            filter(None, (find_invalid_characters(item, f"{field}[{i}]") for i, item in enumerate(value))), None
        )
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return BadRow("NUL character", "holds a NUL character", field=field or None)
    if match := re.search("[\ud800-\udfff]", value):
        half = f"\\u{ord(match[0]):04x}"
        return BadRow("lone surrogate", f"{half} is half a character (a lone surrogate)", field=field or None)
    return None


def decode_utf8(raw: bytes) -> str:
    """`raw` as text; raises `BadRow` where it is none."""
    if b"\0" in raw:
        raise BadRow("NUL byte", f"holds a NUL byte at byte {raw.index(0) + 1} of the line")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise BadRow("not UTF-8", problem) from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, without BOM and line ends; blank ones are left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            # Not strip(): blanks at the ends of a .txt line are text.
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise LoraError(f"{path}: is UTF-16", hint="save it as UTF-8")
            if line.strip():
                yield number, line


def require_object(value: Any) -> dict[str, Any]:
    """`value` where it is a row; raises `BadRow` else."""
    if not isinstance(value, dict):
        raise BadRow("not an object", f"holds {json_type(value)} where an object of fields is due")
    return value


def json_type(value: object) -> str:
    """The name of a JSON value's type, with its article."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return names.get(type(value), number)


def read_jsonl(path: Path) -> Iterator[Line]:
    """One JSON object a line."""
    for number, raw in read_lines(path):
        try:
            text = decode_utf8(raw).strip()
            parsed = parse_json(text)
            if parsed.end < len(text):
                raise BadRow("malformed JSON", f"malformed JSON: more text after column {parsed.end}")
            yield number, parsed.flaw or require_object(parsed.value)
        except BadRow as bad:
            yield number, bad
        except json.JSONDecodeError as error:
            problem = f"malformed JSON at column {error.colno}: {_plain(error.msg)}"
            yield number, BadRow("malformed JSON", problem)


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(" starting at")


def read_json(path: Path) -> Iterator[Line]:
    """One array of objects, decoded object by object, so that memory holds a chunk and not the file."""

    def broken(line: int, problem: str) -> LoraError:
        return LoraError(
            f"{path}:{line}: malformed JSON: {problem}",
            hint="rows behind this place cannot be told apart: mend the file (in .jsonl one bad line is one bad row)",
        )

    window = _JsonStream(path, broken)
    if window.skip_blanks() != "[":
        if window.peek() == "":
            return
        found = "an object" if window.peek() == "{" else "no array"
        raise LoraError(
            f"{path}:{window.line}: holds {found}, where an array of rows is due: [{{...}}, {{...}}]",
            hint="if it holds one object a line, name it .jsonl",
        )
    window.advance(1)
    if window.skip_blanks() == "]":
        window.advance(1)
    else:
        while True:
            window.skip_blanks()
            line = window.line
            parsed = window.decode()
            try:
                yield line, parsed.flaw or require_object(parsed.value)
            except BadRow as bad:
                yield line, bad
            mark = window.skip_blanks()
            if mark not in {",", "]"}:
                raise broken(window.line, f"expected ',' or ']' behind a row, found {_mark(mark)}")
            window.advance(1)
            if mark == "]":
                break
    if mark := window.skip_blanks():
        raise broken(window.line, f"{_mark(mark)} behind the end of the array")


def _mark(character: str) -> str:
    return quote(character) if character else "the end of the file"


class _JsonStream:
    """The part of a JSON file that is being looked at: it moves forward and counts lines."""

    def __init__(self, path: Path, broken: Callable[[int, str], LoraError]) -> None:
        self.line = 1
        self._broken = broken
        self._chunks = self._read(path)
        self._text = ""
        self._at = 0

    def _read(self, path: Path) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with path.open("rb") as file:
            while raw := file.read(CHUNK):
                try:
                    text = decoder.decode(raw)
                except UnicodeDecodeError as error:
                    line = self.line + self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
                    raise self._broken(line, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
                if text:  # "" means the end to whoever reads on
                    yield text
        if decoder.getstate()[0]:
            raise self._broken(self.line + self._text.count("\n", self._at), "the file ends within a character")

    def _grow(self) -> bool:
        """Reads on, at least doubling the window: a row of many chunks is not decoded once a chunk."""
        wanted = max(CHUNK, len(self._text) - self._at)
        pieces = [self._text[self._at :]]
        grown = 0
        while grown < wanted and (chunk := next(self._chunks, "")):
            pieces.append(chunk)
            grown += len(chunk)
        self._text, self._at = "".join(pieces), 0
        return grown > 0

    def peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def advance(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def skip_blanks(self) -> str:
        """Moves to the next character that is no blank and returns it, or '' at the end of the file."""
        while True:
            blanks = BLANKS.match(self._text, self._at)
            self.advance(blanks.end() - self._at if blanks else 0)
            if self.peek() or not self._grow():
                return self.peek()

    def decode(self) -> ParsedJson:
        """The value at the window's start, which moves behind it."""
        while True:
            try:
                parsed = parse_json(self._text, self._at)
            except json.JSONDecodeError as error:
                # Cut-off text fails at its very end or inside a string; anything else is really malformed.
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12
                if cut_off and self._grow():
                    continue
                at_line = self.line + self._text.count("\n", self._at, error.pos)
                raise self._broken(at_line, _plain(error.msg)) from None
            if parsed.end == len(self._text) and self._grow():
                continue  # a number may go on in the next chunk
            self.advance(parsed.end - self._at)
            return parsed


def read_csv(path: Path) -> Iterator[Line]:
    """Comma-separated cells under a header line."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB a cell is less than a long document
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        # A file with CRLF line ends has them within its quoted cells too: the same text as with LF.
        text = (line.replace("\r\n", "\n") for line in file) if first.endswith("\r\n") else file
        cells = csv.reader(text, strict=True)
        header: list[str] = []
        line = 1
        try:
            for row in cells:
                start, line = line, cells.line_num + 1
                if not row:
                    continue
                if not header:
                    header = _header(path, row)
                    continue
                yield start, _csv_row(header, row)
        except csv.Error as error:
            raise LoraError(
                f"{path}:{line}: malformed CSV: {error}",
                hint='rows behind this place cannot be told apart: mend the quotes (a quote within quotes is "")',
            ) from None


def _header(path: Path, names: list[str]) -> list[str]:
    problems = [f"the column {quote(name)} is there twice" for name in names if names.count(name) > 1]
    problems += [f"column {i} has no name" for i, name in enumerate(names, 1) if not name.strip()]
    problems += ["the names are not UTF-8" for name in names if re.search("[\ud800-\udfff]", name)]
    if problems:
        raise LoraError(f"{path}:1: {problems[0]}", hint="the first line of a .csv file names its columns, each once")
    return names


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any] | BadRow:
    if len(row) != len(header):
        return BadRow("wrong number of cells", f"cells: {len(row)} here, {len(header)} in the header")
    values = dict(zip(header, row, strict=True))
    for name, cell in values.items():
        if "\0" in cell:
            return BadRow("NUL byte", "holds a NUL byte", field=name)
        if match := re.search("[\ud800-\udfff]", cell):
            return BadRow("not UTF-8", f"is not UTF-8: byte 0x{ord(match[0]) - 0xDC00:02x}", field=name)
    return values


def read_parquet(path: Path) -> Iterator[Line]:
    """Rows of a Parquet file, numbered from 1."""
    # pyarrow takes half a second to import, and most data is JSON.
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        found = str(error).splitlines()[0]
        raise LoraError(f"{path}: not a readable Parquet file: {found}", hint="write the file again") from None


def read_txt(path: Path) -> Iterator[Line]:
    """One row a line that is not blank, as `datasets` reads text; its field is `text`."""
    for number, raw in read_lines(path):
        try:
            yield number, {"text": decode_utf8(raw)}
        except BadRow as bad:
            yield number, bad


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}
