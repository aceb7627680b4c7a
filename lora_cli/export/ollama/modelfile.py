"""Ollama's Modelfile: write an instruction with a quoted value, and parse a Modelfile by the rules of Ollama's parser.

The rules are those of parser/parser.go. There are no escapes. A value ends at the first line break where the text so
far, stripped of whitespace, is not an open string. Unprintable characters are dropped, except tabs and line breaks.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_cli.errors import LoraError

_QUOTES = '"""'
_LINE_BREAKS = "\r\n"
_CLOSING_QUOTES = re.compile(r'"""[ \t]*[\r\n]')  # ends a string: the parser reads the rest as instructions
_INSTRUCTIONS = frozenset({
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
})  # fmt: skip
_EXPORT_AGAIN_HINT = "export the model again"


class Instruction(NamedTuple):
    """One instruction of a Modelfile."""

    name: str  # in lower case: "from", "template", ...; for PARAMETER, the name of the parameter
    value: str


def format_instruction(command: str, value: str) -> str:
    """Return a line of a Modelfile that sets `command` (SYSTEM, PARAMETER stop, ...) to exactly `value`.

    Raises:
        LoraError: a Modelfile cannot express `value`.
    """
    dropped = sorted({char for char in value if not char.isprintable() and char not in "\t\r\n"})
    if dropped:
        codes = ", ".join(f"U+{ord(char):04X}" for char in dropped[:5])
        raise LoraError(
            f"--to ollama: {command} contains characters that are not allowed in a Modelfile: {codes}",
            hint="remove them from the chat template or the token, or use --to gguf",
        )
    if _CLOSING_QUOTES.search(value):
        raise LoraError(
            f"--to ollama: {command} contains three quotes before a line break, which are not allowed in a Modelfile",
            hint="remove them from the chat template or the token, or use --to gguf",
        )
    return f"{command} {_QUOTES}{value}{_QUOTES}\n"


def parse_modelfile(text: str) -> list[Instruction]:
    """Return the instructions of a Modelfile.

    Raises:
        LoraError: `text` is not a valid Modelfile.
    """
    return list(_parse_instructions(text))


def _parse_instructions(text: str) -> Iterator[Instruction]:
    at = 0
    while at < len(text):
        if text[at] == "#":
            at = next((end for end in range(at, len(text)) if text[end] in _LINE_BREAKS), len(text))
        elif text[at] in " \t\r\n":
            at += 1
        else:
            name, at = _parse_name(text, at)
            if name.lower() not in _INSTRUCTIONS:
                raise LoraError(f"Modelfile: unknown instruction {name[:40]!r}", hint=_EXPORT_AGAIN_HINT)
            if name.lower() == "parameter":
                name, at = _parse_name(text, at)
            value, at = _parse_value(text, at)
            yield Instruction(name.lower(), value)


def _parse_name(text: str, at: int) -> tuple[str, int]:
    """Return a name of letters, digits and underscores, and the index where its value begins, after one blank."""
    end = next((end for end in range(at, len(text)) if text[end] in " \t"), len(text))
    if end == len(text) or not re.fullmatch("[A-Za-z0-9_]+", text[at:end]):
        raise LoraError(f"Modelfile: invalid instruction {text[at:end][:40]!r}", hint=_EXPORT_AGAIN_HINT)
    return text[at:end], end + 1


def _parse_value(text: str, at: int) -> tuple[str, int]:
    """Return the unquoted value that begins at index `at`, and the index after it."""
    value = ""
    for end in range(at, len(text)):
        if text[end] in _LINE_BREAKS and (unquoted := _unquote(value.strip())) is not None:
            return unquoted, end + 1
        if text[end].isprintable() or text[end] in "\t\r\n":
            value += text[end]
    if (unquoted := _unquote(value.strip())) is None:
        raise LoraError(f"Modelfile: the string {value[:40]!r} is not closed", hint=_EXPORT_AGAIN_HINT)
    return unquoted, len(text)


def _unquote(value: str) -> str | None:
    """Return the text between the quotes, `value` if it is not quoted, and None if the closing quotes are missing."""
    for quotes in (_QUOTES, '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value
