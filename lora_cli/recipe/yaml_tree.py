"""Read YAML into a tree that knows its lines, in bounded time and memory whatever the text. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import yaml

from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe, shorten
from lora_cli.recipe.yaml_scalars import Scalar, parse_scalar

# Far above any recipe, far below what hurts: a recipe has some fifty values, four levels deep.
MAX_VALUES = 5_000
MAX_DEPTH = 16

PlainValue = Scalar | list["PlainValue"] | dict[str, "PlainValue"]


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was written: for the value of a key, where the key stands."""

    value: "Scalar | list[Node] | dict[str, Node]"
    place: Location
    source: str = ""  # a scalar as written, without quotes
    quoted: bool = False
    size: int = 1  # values in it, with each alias counted as if written out

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all stands behind the key, as in `training:`."""
        return self.value is None and not self.source

    def plain(self) -> PlainValue:
        match self.value:
            case dict(entries):
                return {key: node.plain() for key, node in entries.items()}
            case list(items):
                return [node.plain() for node in items]
            case value:
                return value


@dataclass(slots=True)
class _Open:
    """A list or section whose end has not been read yet."""

    value: list[Node] | dict[str, Node]
    place: Location
    path: str
    anchor: str | None
    key: Node | None = None  # read, and waiting for its value
    size: int = 1


def parse_yaml(text: str, at: Callable[[int], Location]) -> tuple[Node | None, list[Problem]]:
    """The tree of the one document in `text`, None where it is empty, and what is wrong on the way.

    Raises:
        Unreadable: where reading cannot go on.
    """
    builder = _Builder(at)
    try:
        # Events, not yaml.compose: composing recurses, so ten thousand brackets would overflow the stack.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.YAMLError as error:
        raise UnreadableRecipe(_syntax(error, text, at)) from None
    except ValueError:
        # PyYAML hands the number in "\U00110000" or "%YAML 9...9" to chr() and int() as it stands.
        found = "not valid YAML: a number out of range"
        raise UnreadableRecipe(Problem(at(builder.line), "", found, "check the escapes in quotes")) from None
    root = builder.root
    return (None if root is None or root.is_empty else root), builder.problems


class _Builder:
    """Builds the tree from the parser's events, and holds what is open between two of them."""

    def __init__(self, at: Callable[[int], Location]) -> None:
        self.at = at
        self.line = 1
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._documents = 0
        self._values = 0

    def take(self, event: yaml.Event) -> None:
        if event.start_mark:
            self.line = event.start_mark.line + 1
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._stop("a second document starts here", "a file holds one recipe: remove `---`")
            case yaml.AliasEvent():
                self._add(self._alias(event.anchor or ""))
            case yaml.ScalarEvent():
                self._check_tag(event.tag)
                quoted = event.style is not None
                value = event.value if quoted else parse_scalar(event.value)
                node = Node(value, self.at(self.line), event.value, quoted)
                self._check_text(node)
                self._keep(event.anchor, node)
                self._add(node)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._check_tag(event.tag)
                if len(self._open) == MAX_DEPTH:
                    self._stop(f"nested more than {MAX_DEPTH} levels deep", "a recipe has four: check the brackets")
                if event.anchor:
                    self._anchors.pop(event.anchor, None)
                empty: list[Node] | dict[str, Node] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
                self._open.append(_Open(empty, self.at(self.line), self._path(), event.anchor))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = self._open.pop()
                node = Node(done.value, done.place, size=done.size)
                self._keep(done.anchor, node)
                self._add(node, counted=True)

    def _add(self, node: Node, *, counted: bool = False) -> None:
        # A list's own values were counted one by one as they came.
        self._values += 1 if counted else node.size
        if self._values > MAX_VALUES:
            self._stop(f"more than {MAX_VALUES:,} values, aliases written out", "a recipe has about fifty")
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        parent.size += node.size
        if isinstance(parent.value, list):
            parent.value.append(node)
        elif parent.key is None:
            parent.key = node
        else:
            self._add_entry(parent.value, parent.key, node)
            parent.key = None

    def _add_entry(self, entries: dict[str, Node], key: Node, node: Node) -> None:
        path = self._path()
        if not isinstance(key.value, str):
            what = "a list or section as a key" if isinstance(key.value, list | dict) else "a key that is no text"
            fix = "keys are words" if isinstance(key.value, list | dict) else f'put it in quotes: "{key.source}"'
            self.problems.append(Problem(key.place, path, what, fix))
        elif key.value == "<<" and not key.quoted:
            found = "merge keys are not supported"
            self.problems.append(Problem(key.place, path, found, "write the keys out, or alias single values"))
        elif key.value in entries:
            first, second = entries[key.value].place.order, key.place.order
            found = "written twice" if first == second else f"written twice, in lines {first} and {second}"
            self.problems.append(Problem(key.place, path, found, "keep one"))
        else:
            entries[key.value] = replace(node, place=key.place)

    def _alias(self, anchor: str) -> Node:
        if any(part.anchor == anchor for part in self._open):
            self._stop(f"*{shorten(anchor)} refers to the value that it is part of", "write the value out")
        if anchor not in self._anchors:
            self._stop(
                f"*{shorten(anchor)} refers to no anchor above it",
                f"write &{shorten(anchor)} before the value meant",
            )
        return replace(self._anchors[anchor], place=self.at(self.line))

    def _keep(self, anchor: str | None, node: Node) -> None:
        if anchor:
            self._anchors[anchor] = node

    def _check_tag(self, tag: str | None) -> None:
        if tag not in (None, "!"):
            written = shorten(tag.replace("tag:yaml.org,2002:", "!!"))
            self._note(f"YAML tag {written}", "remove it: tags are not supported")

    def _check_text(self, node: Node) -> None:
        # An escape such as "\uD800" is half a character: it can be neither printed nor written to a file. And
        # "\0" ends a path for the operating system.
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in node.source):
            self._stop("an escape that stands for no character", "write the character itself")

    def _path(self) -> str:
        """The dotted path of the value that is read next."""
        if not self._open:
            return ""
        parent = self._open[-1]
        if isinstance(parent.value, list):
            return f"{parent.path}[{len(parent.value)}]"
        key = parent.key.source if parent.key else ""
        return f"{parent.path}.{key}" if parent.path and key else parent.path or key

    def _note(self, found: str, fix: str) -> None:
        self.problems.append(Problem(self.at(self.line), self._path(), found, fix))

    def _stop(self, found: str, fix: str) -> NoReturn:
        raise UnreadableRecipe(Problem(self.at(self.line), self._path(), found, fix))


# PyYAML's own words are about its grammar; these are about the text. First match wins.
_SYNTAX = (
    (
        "mapping values are not allowed",
        "a `:` where no key can stand",
        "check the indentation, or quote the value",
    ),
    ("could not find expected ':'", "a line that is neither `key: value` nor part of a list", "add the `:`"),
    ("expected <block end>, but found ':'", "a `:` without a key", "write the key before it"),
    ("expected <block end>, but found '-'", "a list item among keys", "indent it below the key it belongs to"),
    ("expected <block end>", "the indentation fits no line above", "indent it like its neighbours"),
    ("expected ',' or ']'", "a `[` is not closed", "close it, with commas between the values"),
    ("expected ',' or '}'", "a `{` is not closed", "close it, with commas between the entries"),
    ("unexpected end of stream", "a quote is not closed", "close it"),
    (
        "unknown escape character",
        "an unknown escape in double quotes",
        "use single quotes, or write \\\\ for \\",
    ),
    (
        "expected the node content",
        "a value is expected here",
        "quote it if it starts with a special character",
    ),
    (
        "sequence entries are not allowed",
        "a `-` where no list can stand",
        "start the list in a new line",
    ),
    ("cannot start any token", "a character that cannot start a value", "put the value in quotes"),
)


def _syntax(error: yaml.YAMLError, text: str, at: Callable[[int], Location]) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(at(line), "", f"a control character (U+{ord(text[error.position]):04X})", "remove it")
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(at(1), "", f"not valid YAML: {error}", "check it in an editor that knows YAML")
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    indent = lines[line - 1][: -len(lines[line - 1].lstrip()) or None] if line <= len(lines) else ""
    if "\t" in indent:
        return Problem(at(line), "", "a tab in the indentation", "indent with spaces")
    problem = error.problem or error.context or ""
    for known, found, fix in _SYNTAX:
        if known in problem:
            # What was opened and never closed is found at the end of the file; its start helps more.
            if "not closed" in found and error.context_mark:
                line = error.context_mark.line + 1
            return Problem(at(line), "", found, fix)
    return Problem(at(line), "", f"not valid YAML: {problem}", "check it in an editor that knows YAML")
