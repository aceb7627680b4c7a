"""Read JSONL, JSON and text files row by row, with line numbers; parse JSON values. No tokenizer, no torch."""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lora_cli.data.data_file import DataFile
from lora_cli.data.records import BadRow, Line
from lora_cli.errors import LoraError

CHUNK = 1 << 20  # bytes of a .json file that are read at a time
MAX_LINE = 1 << 28  # bytes of a row, which is in memory several times
MAX_DEPTH = 128  # levels of lists and objects in a row: everything that follows visits them with recursive functions
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
WHITESPACE = re.compile(r"[ \t\r\n]*")


class ParsedJson(NamedTuple):
    """A JSON value, and the first problem that Python's JSON decoder accepts but a dataset row must not contain."""

    value: Any
    end: int  # index of the first character after the value
    flaw: BadRow | None


def parse_json(text: str, start: int = 0) -> ParsedJson:
    """Parse the JSON value at index `start`; unlike `json.loads`, report repeated keys, NaN and infinity.

    Raises:
        json.JSONDecodeError: the text is not JSON.
    """
    flaws: list[BadRow] = []

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            flaws.append(BadRow("NaN or infinity", f"{quote(digits)} is larger than every number"))
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            keys = [key for key, _ in items]
            repeated = next(key for key in keys if keys.count(key) > 1)
            flaws.append(BadRow("repeated key", f"the key {quote(repeated)} occurs twice", field=repeated))
        return result

    def constant(name: str) -> None:
        flaws.append(BadRow("NaN or infinity", f"{name} is not a JSON value"))

    try:
        decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError(TOO_DEEP, text, start) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to convert numbers of thousands of digits
        raise json.JSONDecodeError("a number with too many digits", text, start) from None
    # Most rows have fewer brackets than levels that are allowed.
    brackets = text.count("[", start, end) + text.count("{", start, end)
    if brackets > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise json.JSONDecodeError(TOO_DEEP, text, start)
    if not flaws and text.find("\\u", start, end) >= 0:
        flaws.extend(filter(None, [find_invalid_characters(value)]))
    return ParsedJson(value, end, flaws[0] if flaws else None)


def _is_deeper(value: object, levels: int) -> bool:
    """Return whether lists and objects are nested more than `levels` deep; without recursion, which has a limit too."""
    inner: list[object] = [value]
    for _ in range(levels):
        containers = [each for each in inner if isinstance(each, list | dict)]
        inner = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
        if not inner:
            return False
    return any(isinstance(each, list | dict) for each in inner)


def parse_json_field(text: str, *, field: str) -> Any:
    """Parse the JSON text of a table cell or string field.

    Raises:
        BadRow: the text is not one JSON value.
    """
    try:
        parsed = parse_json(text.strip())
    except json.JSONDecodeError:
        raise BadRow("malformed JSON", "is a string, but not valid JSON", field=field) from None
    if parsed.end < len(text.strip()):
        raise BadRow("malformed JSON", "is a string, but not valid JSON", field=field)
    if parsed.flaw is not None:
        raise BadRow(parsed.flaw.reason, f"in its JSON text: {parsed.flaw.problem}", field=field)
    return parsed.value


def quote(value: object, limit: int = 40) -> str:
    """Return `value` as a quoted text that is safe to print, at most `limit` characters long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[0]


def find_invalid_characters(value: object, field: str = "") -> BadRow | None:
    """Return a BadRow for the first lone surrogate or NUL: JSON escapes can write them, but they are not text."""
    if isinstance(value, dict):
        results = (
            find_invalid_characters(key, field) or find_invalid_characters(item, f"{field}.{key}" if field else key)
            for key, item in value.items()
        )
        return next(filter(None, results), None)
    if isinstance(value, list):
        return next(
            filter(None, (find_invalid_characters(item, f"{field}[{i}]") for i, item in enumerate(value))), None
        )
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return BadRow("NUL character", "contains a NUL character", field=field or None)
    if match := re.search("[\ud800-\udfff]", value):
        half = f"\\u{ord(match[0]):04x}"
        return BadRow("lone surrogate", f"contains {half}, a lone surrogate (half a character)", field=field or None)
    return None


def decode_utf8(raw: bytes) -> str:
    """Decode one line.

    Raises:
        BadRow: it contains a NUL byte, or is not UTF-8.
    """
    if b"\0" in raw:
        raise BadRow("NUL byte", f"contains a NUL byte at byte {raw.index(0) + 1} of the line")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise BadRow("not UTF-8", problem) from None


def read_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their 1-based numbers, without BOM and line ends; skip blank lines.

    Raises:
        LoraError: the file is UTF-16, or a line has more than `MAX_LINE` bytes.
    """
    with file.open() as content:
        number = 0
        while raw := content.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise too_long_row(file.name, number)
            # Not strip(): spaces at the ends of a .txt line are part of the text.
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise LoraError(f"{file.name}: is encoded as UTF-16", hint="save it as UTF-8")
            if line.strip():
                yield number, line


def too_long_row(name: str, line: int) -> LoraError:
    """Return the error for a row of more bytes than fit in memory several times."""
    return LoraError(
        f"{name}:{line}: a row of more than {MAX_LINE >> 20} MiB, or a file without line ends",
        hint="write each row on a line of its own, and split long texts into several rows",
    )


def require_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object.

    Raises:
        BadRow: it is another JSON value.
    """
    if not isinstance(value, dict):
        raise BadRow("not an object", f"is {json_type(value)}, not a JSON object")
    return value


def json_type(value: object) -> str:
    """Return the name of a JSON value's type, with its article: `a string`."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return names.get(type(value), number)


def read_jsonl(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a file with one JSON object per line.

    Raises:
        LoraError: the file is UTF-16.
    """
    for number, raw in read_lines(file):
        try:
            text = decode_utf8(raw).strip()
            parsed = parse_json(text)
            if parsed.end < len(text):
                raise BadRow("malformed JSON", f"malformed JSON: more text after column {parsed.end}")
            yield Line(number, parsed.flaw or require_object(parsed.value))
        except BadRow as bad:
            yield Line(number, bad)
        except json.JSONDecodeError as error:
            problem = f"malformed JSON at column {error.colno}: {_shorten(error.msg)}"
            yield Line(number, BadRow("malformed JSON", problem))


def _shorten(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(" starting at")


def read_json(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a file with one array of objects, with only a chunk of the file in memory.

    Raises:
        LoraError: the file is not an array, or not valid JSON.
    """

    def malformed(line: int, problem: str) -> LoraError:
        return LoraError(
            f"{file.name}:{line}: malformed JSON: {problem}",
            hint="the rows after it cannot be read: fix the file (in .jsonl, a bad line affects only its own row)",
        )

    window = _JsonStream(file, malformed)
    if window.skip_whitespace() != "[":
        if window.peek() == "":
            return
        problem = "is an object, not an array of rows" if window.peek() == "{" else "is not an array of rows"
        raise LoraError(
            f"{file.name}:{window.line}: {problem}: [{{...}}, {{...}}]",
            hint="if it has one object per line, rename it to .jsonl",
        )
    window.advance(1)
    if window.skip_whitespace() == "]":
        window.advance(1)
    else:
        while True:
            window.skip_whitespace()
            line = window.line
            parsed = window.decode()
            try:
                yield Line(line, parsed.flaw or require_object(parsed.value))
            except BadRow as bad:
                yield Line(line, bad)
            character = window.skip_whitespace()
            if character not in {",", "]"}:
                raise malformed(window.line, f"expected ',' or ']' after a row, found {_describe_character(character)}")
            window.advance(1)
            if character == "]":
                break
    if character := window.skip_whitespace():
        raise malformed(window.line, f"found {_describe_character(character)} after the end of the array")


def _describe_character(character: str) -> str:
    return quote(character) if character else "the end of the file"


class _JsonStream:
    """A window over a JSON file that moves forward and counts lines."""

    def __init__(self, file: DataFile, malformed: Callable[[int, str], LoraError]) -> None:
        self.line = 1
        self._name = file.name
        self._malformed = malformed
        self._chunks = self._read(file)
        self._text = ""
        self._position = 0

    def _read(self, file: DataFile) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with file.open() as content:
            while raw := content.read(CHUNK):
                try:
                    text = decoder.decode(raw)
                except UnicodeDecodeError as error:
                    line = self._last_line() + error.object.count(b"\n", 0, error.start)
                    raise self._malformed(line, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
                if text:  # an empty chunk means the end of the file to `_grow`
                    yield text
        if decoder.getstate()[0]:
            raise self._malformed(self._last_line(), "the file ends within a character")

    def _last_line(self) -> int:
        return self.line + self._text.count("\n", self._position)

    def _grow(self) -> bool:
        """Read more text; False at the end of the file.

        Doubles the window at least, so that a row of many chunks is not decoded again after each chunk.
        """
        needed = max(CHUNK, len(self._text) - self._position)
        if needed > MAX_LINE:
            raise too_long_row(self._name, self.line)
        pieces = [self._text[self._position :]]
        grown = 0
        while grown < needed and (chunk := next(self._chunks, "")):
            pieces.append(chunk)
            grown += len(chunk)
        self._text, self._position = "".join(pieces), 0
        return grown > 0

    def peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def advance(self, count: int) -> None:
        self.line += self._text.count("\n", self._position, self._position + count)
        self._position += count

    def skip_whitespace(self) -> str:
        """Move to the next character that is not white space and return it, or '' at the end of the file."""
        while True:
            whitespace = WHITESPACE.match(self._text, self._position)
            self.advance(whitespace.end() - self._position if whitespace else 0)
            if self.peek() or not self._grow():
                return self.peek()

    def decode(self) -> ParsedJson:
        """Parse the value at the start of the window and move the window behind it.

        Raises:
            LoraError: the value is not valid JSON.
        """
        while True:
            try:
                parsed = parse_json(self._text, self._position)
            except json.JSONDecodeError as error:
                # The end of the window can cause an error at the end of the text or in a string; other errors are real.
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12
                if cut_off and self._grow():
                    continue
                at_line = self.line + self._text.count("\n", self._position, error.pos)
                raise self._malformed(at_line, _shorten(error.msg)) from None
            if parsed.end == len(self._text) and self._grow():
                continue  # a number may continue in the next chunk
            self.advance(parsed.end - self._position)
            return parsed


def read_txt(file: DataFile) -> Iterator[Line]:
    """Yield one row with the field `text` for each line that is not blank, as `datasets` reads text files.

    Raises:
        LoraError: the file is UTF-16.
    """
    for number, raw in read_lines(file):
        try:
            yield Line(number, {"text": decode_utf8(raw)})
        except BadRow as bad:
            yield Line(number, bad)
