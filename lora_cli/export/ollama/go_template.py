"""Go's text/template, as far as the TEMPLATE of an Ollama Modelfile needs it: escaping of text, and an interpreter.

Supported are: text; output of strings and fields; `range $i, $m := LIST`; `if`, `else if`, `else`; variables that are
declared outside all blocks; and the functions in `_FUNCTIONS`. Trim markers (`{{-`) are not supported: our templates
have no whitespace to trim. As in Go, text up to `{{` is output unchanged, and a string's end is searched before `}}`.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.errors import LoraError

# Braces can begin an action, and three quotes can end a Modelfile's string.
_SPECIAL = re.compile(r'\{+|"{3,}')


def escape_text(literal: str) -> str:
    """Return a template that outputs `literal`: the same text, with everything escaped that would be parsed.

    Unprintable characters are escaped too, because Ollama's Modelfile parser drops them (see `modelfile`).

    Raises:
        LoraError: `literal` contains half of a surrogate pair, which Go cannot express.
    """
    escaped = _SPECIAL.sub(lambda match: _string_action(match[0]), literal)
    return "".join(char if char.isprintable() or char in "\n\t" else _string_action(char) for char in escaped)


def _string_action(literal: str) -> str:
    return "{{ " + quote_string(literal) + " }}"


def quote_string(value: str) -> str:
    """Return `value` as a string constant of Go, without unprintable characters.

    Raises:
        LoraError: `value` contains half of a surrogate pair, which Go cannot express.
    """
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise LoraError(
            f"--to ollama: the chat template contains half a character (a lone surrogate): {value!r}",
            hint="fix the chat template",
        )
    return '"' + "".join(_escape(char) for char in value) + '"'


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


class UnsupportedTemplate(ValueError):
    """A template with syntax that the interpreter does not support."""


class _Action(NamedTuple):
    tokens: tuple[str, ...]  # of the text between `{{` and `}}`


class _If(NamedTuple):
    condition: tuple[str, ...]
    then: "_Block"
    else_: "_Block"


class _Range(NamedTuple):
    index_name: str
    item_name: str
    items: tuple[str, ...]  # tokens of the expression
    body: "_Block"


_Block = Sequence[str | _Action | _If | _Range]


def render_go_template(template: str, data: Mapping[str, object]) -> str:
    """Return the text that Go renders from `template`, with `data` as the value of `.` and `$`.

    Raises:
        UnsupportedTemplate: `template` has syntax that is not supported here.
    """
    nodes = deque(_lex(template))
    block = _parse_block(nodes)
    if nodes:
        raise UnsupportedTemplate(f"{nodes[0]} outside any block")
    return "".join(_execute(block, data, {"$": data}))


_TOKEN = re.compile(r'[ \t\r\n]*("(?:[^"\\\n]|\\.)*"|\$?\w*(?:\.\w+)+|\$\w*|[A-Za-z]+|\d+|:=|=|[,()]|\}\})')


def _lex(template: str) -> Iterator[str | _Action]:
    """Yield texts and actions in turn, each action split into tokens."""
    at = 0
    while (begin := template.find("{{", at)) >= 0:
        yield template[at:begin]
        tokens: list[str] = []
        at = begin + 2
        while not tokens or tokens[-1] != "}}":
            token = _TOKEN.match(template, at)
            if token is None:
                raise UnsupportedTemplate(f"unknown syntax in the action {template[begin : begin + 40]!r}")
            tokens.append(token[1])
            at = token.end()
        yield _Action(tuple(tokens[:-1]))
    yield template[at:]


def _parse_block(nodes: deque[str | _Action]) -> list[str | _Action | _If | _Range]:
    """Consume and return the nodes of one block, up to the `else` or `end` of the enclosing one."""
    block: list[str | _Action | _If | _Range] = []
    while nodes:
        node = nodes[0]
        if isinstance(node, _Action) and node.tokens[:1] in (("else",), ("end",)):
            break
        nodes.popleft()
        match node:
            case _Action(("if", *condition)):
                block.append(_parse_if(tuple(condition), nodes))
            case _Action(("range", index, ",", item, ":=", *items)):
                block.append(_Range(index, item, tuple(items), _parse_block(nodes)))
                _consume_end(nodes)
            case _:
                block.append(node)
    return block


def _parse_if(condition: tuple[str, ...], nodes: deque[str | _Action]) -> _If:
    then = _parse_block(nodes)
    match nodes[0] if nodes else None:
        case _Action(("else", "if", *other)):
            nodes.popleft()
            return _If(condition, then, [_parse_if(tuple(other), nodes)])  # both share one `end`
        case _Action(("else",)):
            nodes.popleft()
            else_ = _parse_block(nodes)
            _consume_end(nodes)
            return _If(condition, then, else_)
    _consume_end(nodes)
    return _If(condition, then, [])


def _consume_end(nodes: deque[str | _Action]) -> None:
    if not nodes or nodes.popleft() != _Action(("end",)):
        raise UnsupportedTemplate("a block without `end`")


def _execute(block: _Block, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in block:
        match node:
            case str():
                yield node
            case _If(condition, then, else_):
                yield from _execute(then if _evaluate(condition, dot, variables) else else_, dot, variables)
            case _Range(index, item, items, body):
                for variables[index], variables[item] in enumerate(_evaluate(items, dot, variables)):  # noqa: B020
                    yield from _execute(body, variables[item], variables)
            case _Action((name, ":=" | "=", *tokens)):
                variables[name] = _evaluate(tokens, dot, variables)
            case _Action(tokens):
                value = _evaluate(tokens, dot, variables)
                if not isinstance(value, str):
                    raise UnsupportedTemplate(f"output of {value!r}, which is not a string")
                yield value


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


def _evaluate(tokens: Sequence[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    remaining = deque(tokens)
    value = _evaluate_call(remaining, dot, variables)
    if remaining:
        raise UnsupportedTemplate(f"the expression {' '.join(tokens)}")
    return value


def _evaluate_call(remaining: deque[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    """Evaluate a function with all operands that follow as its arguments, or a single operand."""
    if remaining and remaining[0] in _FUNCTIONS:
        function, arguments = _FUNCTIONS[remaining.popleft()], []
        while remaining and remaining[0] != ")":
            arguments.append(_evaluate_operand(remaining, dot, variables))
        return function(*arguments)
    return _evaluate_operand(remaining, dot, variables)


def _evaluate_operand(remaining: deque[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    token = remaining.popleft() if remaining else ""
    if token == "(":
        value = _evaluate_call(remaining, dot, variables)
        if not remaining or remaining.popleft() != ")":
            raise UnsupportedTemplate("an unclosed parenthesis")
        # After a parenthesis, our templates have a field of its value, never a separate operand that begins with a dot.
        return _get_field(value, remaining.popleft()) if remaining and remaining[0].startswith(".") else value
    if token.startswith('"'):
        return _unquote(token)
    if token.isdecimal():
        return int(token)
    if token in ("true", "false"):
        return token == "true"
    name, dotted, fields = token.partition(".")
    if name and name not in variables:
        raise UnsupportedTemplate(f"the operand {token}")
    return _get_field(variables[name] if name else dot, dotted + fields)


def _get_field(value: Any, path: str) -> Any:
    for field in path.split(".")[1:]:
        value = value[field]
    return value


def _unquote(constant: str) -> str:
    return re.sub(
        r'\\(?:U([0-9a-f]{8})|u([0-9a-f]{4})|(["\\]))',
        lambda match: match[3] or chr(int(match[1] or match[2], 16)),
        constant[1:-1],
    )
