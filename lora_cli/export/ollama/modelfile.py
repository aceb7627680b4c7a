"""Ollama's Modelfile: how text has to be quoted in one, and a reader with the rules of Ollama's own.

From its parser/parser.go: there are no escapes. A value ends at the first line end where what was read so far, without
white space around it, is no open string; characters that cannot be printed are dropped, but for tabs and line ends.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_cli.errors import LoraError

_QUOTES = '"""'
_LINE_ENDS = "\r\n"
_CLOSED = re.compile(r'"""[ \t]*[\r\n]')  # where a string ends: what follows is read as instructions
_INSTRUCTIONS = frozenset({
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
})  # fmt: skip
_EXPORT_AGAIN_HINT = "export the model again"


class Instruction(NamedTuple):
    """One instruction."""

    name: str  # in small letters: "from", "template", ...; for PARAMETER, the parameter's
    value: str


def format_instruction(command: str, value: str) -> str:
    """A line of a Modelfile that gives `command` (SYSTEM, PARAMETER stop, ...) exactly `value`.

    Raises:
        LoraError: no Modelfile can.
    """
    lost = sorted({char for char in value if not char.isprintable() and char not in "\t\r\n"})
    if lost:
        named = ", ".join(f"U+{ord(char):04X}" for char in lost[:5])
        raise LoraError(
            f"--to ollama: {command} has characters that a Modelfile cannot hold: {named}",
            hint="take them out of the chat template or the token, or use --to gguf",
        )
    if _CLOSED.search(value):
        raise LoraError(
            f"--to ollama: {command} has three quotes before a line end, which a Modelfile cannot hold",
            hint="take them out of the chat template or the token, or use --to gguf",
        )
    return f"{command} {_QUOTES}{value}{_QUOTES}\n"


def parse_modelfile(text: str) -> list[Instruction]:
    """The instructions of a Modelfile.

    Raises:
        LoraError: it is none.
    """
    return list(_commands(text))


def _commands(text: str) -> Iterator[Instruction]:
    at = 0
    while at < len(text):
        if text[at] == "#":
            at = next((end for end in range(at, len(text)) if text[end] in _LINE_ENDS), len(text))
        elif text[at] in " \t\r\n":
            at += 1
        else:
            name, at = _word(text, at)
            if name.lower() not in _INSTRUCTIONS:
                raise LoraError(f"a Modelfile with the instruction {name[:40]!r}", hint=_EXPORT_AGAIN_HINT)
            if name.lower() == "parameter":
                name, at = _word(text, at)
            value, at = _value(text, at)
            yield Instruction(name.lower(), value)


def _word(text: str, at: int) -> tuple[str, int]:
    """Letters, digits and underscores, and where the value begins: behind one blank."""
    end = next((end for end in range(at, len(text)) if text[end] in " \t"), len(text))
    if end == len(text) or not re.fullmatch("[A-Za-z0-9_]+", text[at:end]):
        raise LoraError(f"a Modelfile with the instruction {text[at:end][:40]!r}", hint=_EXPORT_AGAIN_HINT)
    return text[at:end], end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    held = ""
    for end in range(at, len(text)):
        if text[end] in _LINE_ENDS and (found := _unquoted(held.strip())) is not None:
            return found, end + 1
        if text[end].isprintable() or text[end] in "\t\r\n":
            held += text[end]
    if (found := _unquoted(held.strip())) is None:
        raise LoraError(f"a Modelfile that ends inside of {held[:40]!r}", hint=_EXPORT_AGAIN_HINT)
    return found, len(text)


def _unquoted(held: str) -> str | None:
    """What is between the quotes, all of it where there are none; None where they are open."""
    for quotes in (_QUOTES, '"'):
        if held.startswith(quotes):
            closed = len(held) >= 2 * len(quotes) and held.endswith(quotes)
            return held[len(quotes) : -len(quotes)] if closed else None
    return held
