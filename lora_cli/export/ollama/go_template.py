"""The part of Go's text/template that a Modelfile's TEMPLATE is written in here: escaping, and an interpreter.

What is written: text; strings and fields that are put out; `range $i, $m := LIST`; `if`, `else if`, `else`; variables,
declared outside of all blocks; and the functions of `_FUNCTIONS`. Trim markers are not written: blanks stand where they
are meant. As in Go, text up to `{{` is put out as it is, and a string's end is looked for before `}}`.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.errors import LoraError

# Braces could begin an action, and three quotes end a Modelfile's string.
_SPECIAL = re.compile(r'\{+|"{3,}')


def escape_text(literal: str) -> str:
    """A template that puts out `literal`: itself, but for what would be read otherwise.

    What cannot be printed is escaped too: a Modelfile's reader drops it (see `lora_cli.export.modelfile`).
    """
    escaped = _SPECIAL.sub(lambda match: _string_action(match[0]), literal)
    return "".join(char if char.isprintable() or char in "\n\t" else _string_action(char) for char in escaped)


def _string_action(literal: str) -> str:
    return "{{ " + quote_string(literal) + " }}"


def quote_string(value: str) -> str:
    """A string constant of Go's, without characters that cannot be printed.

    Raises:
        LoraError: half of a surrogate pair, which Go has no way to write.
    """
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise LoraError(
            f"--to ollama: the chat template has half a character in it: {value!r}", hint="mend the chat template"
        )
    return '"' + "".join(_escape(char) for char in value) + '"'


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


class UnsupportedTemplate(ValueError):
    """A template that is not in the part of the language that is written here."""


class _Action(NamedTuple):
    words: tuple[str, ...]


class _If(NamedTuple):
    condition: tuple[str, ...]
    then: "_Block"
    otherwise: "_Block"


class _Range(NamedTuple):
    number: str
    item: str
    over: tuple[str, ...]
    body: "_Block"


_Block = Sequence[str | _Action | _If | _Range]


def render_go_template(template: str, data: Mapping[str, object]) -> str:
    """What Go makes of `template`; `data` is what `.` and `$` stand for.

    Raises:
        NotWritten: it has what is not known here.
    """
    nodes = deque(_cut(template))
    block = _parse(nodes)
    if nodes:
        raise UnsupportedTemplate(f"{nodes[0]} without a beginning")
    return "".join(_run(block, data, {"$": data}))


_WORD = re.compile(r'[ \t\r\n]*("(?:[^"\\\n]|\\.)*"|\$?\w*(?:\.\w+)+|\$\w*|[A-Za-z]+|\d+|:=|=|[,()]|\}\})')


def _cut(template: str) -> Iterator[str | _Action]:
    """Texts and actions by turns, each action cut into words."""
    at = 0
    while (begin := template.find("{{", at)) >= 0:
        yield template[at:begin]
        words: list[str] = []
        at = begin + 2
        while not words or words[-1] != "}}":
            word = _WORD.match(template, at)
            if word is None:
                raise UnsupportedTemplate(f"an action at {template[begin : begin + 40]!r}")
            words.append(word[1])
            at = word.end()
        yield _Action(tuple(words[:-1]))
    yield template[at:]


def _parse(nodes: deque[str | _Action]) -> list[str | _Action | _If | _Range]:
    """The nodes up to the `else` or `end` that belongs to what is around them."""
    block: list[str | _Action | _If | _Range] = []
    while nodes:
        node = nodes[0]
        if isinstance(node, _Action) and node.words[:1] in (("else",), ("end",)):
            break
        nodes.popleft()
        match node:
            case _Action(("if", *condition)):
                block.append(_branch(tuple(condition), nodes))
            case _Action(("range", number, ",", item, ":=", *over)):
                block.append(_Range(number, item, tuple(over), _parse(nodes)))
                _end(nodes)
            case _:
                block.append(node)
    return block


def _branch(condition: tuple[str, ...], nodes: deque[str | _Action]) -> _If:
    then = _parse(nodes)
    match nodes[0] if nodes else None:
        case _Action(("else", "if", *other)):
            nodes.popleft()
            return _If(condition, then, [_branch(tuple(other), nodes)])  # both have the same `end`
        case _Action(("else",)):
            nodes.popleft()
            otherwise = _parse(nodes)
            _end(nodes)
            return _If(condition, then, otherwise)
    _end(nodes)
    return _If(condition, then, [])


def _end(nodes: deque[str | _Action]) -> None:
    if not nodes or nodes.popleft() != _Action(("end",)):
        raise UnsupportedTemplate("a block without an end")


def _run(block: _Block, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in block:
        match node:
            case str():
                yield node
            case _If(condition, then, otherwise):
                yield from _run(then if _value(condition, dot, variables) else otherwise, dot, variables)
            case _Range(number, item, over, body):
                for variables[number], variables[item] in enumerate(_value(over, dot, variables)):  # noqa: B020
                    yield from _run(body, variables[item], variables)
            case _Action((name, ":=" | "=", *words)):
                variables[name] = _value(words, dot, variables)
            case _Action(words):
                found = _value(words, dot, variables)
                if not isinstance(found, str):
                    raise UnsupportedTemplate(f"{found!r} put out")
                yield found


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": lambda first, *others: first in others,
    "ne": lambda first, other: first != other,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": lambda values, start: values[start:],
    "index": lambda values, number: values[number],
}


def _value(words: Sequence[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    left = deque(words)
    found = _command(left, dot, variables)
    if left:
        raise UnsupportedTemplate(" ".join(words))
    return found


def _command(left: deque[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    """A function with all that follows as its arguments, or one operand."""
    if left and left[0] in _FUNCTIONS:
        function, arguments = _FUNCTIONS[left.popleft()], []
        while left and left[0] != ")":
            arguments.append(_operand(left, dot, variables))
        return function(*arguments)
    return _operand(left, dot, variables)


def _operand(left: deque[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    word = left.popleft() if left else ""
    if word == "(":
        found = _command(left, dot, variables)
        if not left or left.popleft() != ")":
            raise UnsupportedTemplate("a parenthesis that is not closed")
        # A field of it follows at once in what is written here, never an operand that begins with a dot.
        return _fields(found, left.popleft()) if left and left[0].startswith(".") else found
    if word.startswith('"'):
        return _unquote(word)
    if word.isdecimal():
        return int(word)
    if word in ("true", "false"):
        return word == "true"
    name, dotted, fields = word.partition(".")
    if name and name not in variables:
        raise UnsupportedTemplate(word)
    return _fields(variables[name] if name else dot, dotted + fields)


def _fields(value: Any, path: str) -> Any:
    for field in path.split(".")[1:]:
        value = value[field]
    return value


def _unquote(constant: str) -> str:
    return re.sub(
        r'\\(?:U([0-9a-f]{8})|u([0-9a-f]{4})|(["\\]))',
        lambda match: match[3] or chr(int(match[1] or match[2], 16)),
        constant[1:-1],
    )
