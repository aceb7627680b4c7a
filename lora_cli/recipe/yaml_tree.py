"""Parse YAML into a tree with line numbers, in bounded time and memory for any input. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import yaml

from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe, shorten
from lora_cli.recipe.yaml_scalars import Scalar, parse_scalar

# Far above any recipe (about fifty values, four levels deep), and low enough to bound time and memory.
MAX_VALUES = 5_000
MAX_DEPTH = 16

PlainValue = Scalar | list["PlainValue"] | dict[str, "PlainValue"]


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its location: for the value of a key, the location of the key."""

    value: "Scalar | list[Node] | dict[str, Node]"
    location: Location
    source: str = ""  # the text of a scalar, without quotes
    quoted: bool = False
    size: int = 1  # number of values in it, aliases expanded
    tag: str = ""  # of another tool's file: a YAML tag that does not say which kind of value it is
    anchor: str = ""  # that other values refer to it by

    @property
    def is_empty(self) -> bool:
        """Whether the key has no value at all, as in `training:`."""
        return self.value is None and not self.source

    def plain(self) -> PlainValue:
        """Return the value without locations."""
        match self.value:
            case dict(entries):
                return {key: node.plain() for key, node in entries.items()}
            case list(items):
                return [node.plain() for node in items]
            case value:
                return value


@dataclass(slots=True)
class _Open:
    """A list or section whose end has not been parsed yet."""

    value: list[Node] | dict[str, Node]
    location: Location
    path: str  # dotted
    anchor: str | None
    tag: str
    key: Node | None = None  # the key whose value comes next
    size: int = 1
    merged: list[Node] = field(default_factory=list)  # the sections of its merge keys


# YAML's own tags for scalars, and the types that their values may have.
SCALAR_TAGS: dict[str, tuple[type, ...]] = {
    "tag:yaml.org,2002:int": (int,),
    "tag:yaml.org,2002:float": (int, float),
    "tag:yaml.org,2002:bool": (bool,),
    "tag:yaml.org,2002:null": (type(None),),
}
TEXT_TAG, LIST_TAG, SECTION_TAG = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))


def parse_yaml(text: str, at: Callable[[int], Location], *, foreign: bool = False) -> tuple[Node | None, list[Problem]]:
    """Return the tree of the single document in `text` (None if it is empty), and its problems.

    Args:
        text: YAML.
        at: returns the location of a line, counted from 1.
        foreign: whether it is of another tool, and may have what a recipe must not: merge keys (`<<: *base` adds the
            keys of a section, as in YAML 1.1), keys that are not strings (under their text), and tags.

    Raises:
        UnreadableRecipe: a problem after which parsing cannot continue.
    """
    builder = _TreeBuilder(at, foreign=foreign)
    try:
        # Events, not yaml.compose: composing recurses, so ten thousand brackets would overflow the stack.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.add_event(event)
    except yaml.YAMLError as error:
        raise UnreadableRecipe(_syntax_problem(error, text, at)) from None
    except ValueError:
        # PyYAML passes the number in "\U00110000" or "%YAML 9...9" to chr() and int() unchecked.
        message = "not valid YAML: a number out of range"
        raise UnreadableRecipe(Problem(at(builder.line), "", message, "check the escape sequences in quotes")) from None
    root = builder.root
    return (None if root is None or root.is_empty else root), builder.problems


class _TreeBuilder:
    """Builds the tree from the events of PyYAML's parser."""

    def __init__(self, at: Callable[[int], Location], *, foreign: bool) -> None:
        self.at = at
        self.foreign = foreign
        self.line = 1
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._documents = 0
        self._values = 0

    def add_event(self, event: yaml.Event) -> None:
        if event.start_mark:
            self.line = event.start_mark.line + 1
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._stop("a second YAML document starts here", "write one recipe per file: remove `---`")
            case yaml.AliasEvent():
                self._add(self._alias(event.anchor or ""))
            case yaml.ScalarEvent():
                node = self._scalar(event)
                self._check_text(node)
                self._set_anchor(event.anchor, node)
                self._add(node)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                own = SECTION_TAG if isinstance(event, yaml.MappingStartEvent) else LIST_TAG
                tag = self._unknown_tag(None if event.tag == own and self.foreign else event.tag)
                if len(self._open) == MAX_DEPTH:
                    self._stop(
                        f"nested more than {MAX_DEPTH} levels deep", "a recipe has about four: check the brackets"
                    )
                if event.anchor:
                    self._anchors.pop(event.anchor, None)
                empty: list[Node] | dict[str, Node] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
                self._open.append(_Open(empty, self.at(self.line), self._path(), event.anchor, tag))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = self._open.pop()
                if isinstance(done.value, dict):
                    _merge(done.value, done.merged)
                node = Node(done.value, done.location, size=done.size, tag=done.tag, anchor=done.anchor or "")
                self._set_anchor(done.anchor, node)
                self._add(node, counted=True)

    def _add(self, node: Node, *, counted: bool = False) -> None:
        # The values of a list or section that has just ended are counted already.
        self._values += 1 if counted else node.size
        if self._values > MAX_VALUES:
            self._stop(f"more than {MAX_VALUES:,} values, aliases expanded", "a recipe has about fifty")
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
        if self.foreign and not isinstance(key.value, list | dict | str):
            key = replace(key, value=key.source or "null")
        if not isinstance(key.value, str):
            is_scalar = not isinstance(key.value, list | dict)
            message = "a key that is not a string" if is_scalar else "a list or section as a key"
            fix = f'put it in quotes: "{key.source}"' if is_scalar else "write a string as the key"
            self.problems.append(Problem(key.location, path, message, fix))
        elif key.value == "<<" and not key.quoted and self.foreign:
            sections = node.value if isinstance(node.value, list) else [node]
            if all(isinstance(each.value, dict) for each in sections):
                self._open[-1].merged += sections
            else:
                self.problems.append(Problem(key.location, path, "`<<` without a section", "write `<<: *NAME`"))
        elif key.value == "<<" and not key.quoted:
            fix = "write each key, or use aliases for single values"
            self.problems.append(Problem(key.location, path, "merge keys are not supported", fix))
        elif key.value in entries:
            first, second = entries[key.value].location.order, key.location.order
            message = "duplicate key" if first == second else f"duplicate key, in lines {first} and {second}"
            self.problems.append(Problem(key.location, path, message, "keep one"))
        else:
            entries[key.value] = replace(node, location=key.location)

    def _alias(self, anchor: str) -> Node:
        if any(part.anchor == anchor for part in self._open):
            self._stop(
                f"alias *{shorten(anchor)} is inside the value that it refers to",
                "write the value instead of the alias",
            )
        if anchor not in self._anchors:
            self._stop(
                f"alias *{shorten(anchor)} has no anchor before it",
                f"write &{shorten(anchor)} before the value that it refers to",
            )
        return replace(self._anchors[anchor], location=self.at(self.line), anchor="")

    def _set_anchor(self, anchor: str | None, node: Node) -> None:
        if anchor:
            self._anchors[anchor] = node

    def _scalar(self, event: yaml.ScalarEvent) -> Node:
        """Return a scalar; in a file of another tool, with the type that its tag names."""
        quoted = event.style is not None
        value = event.value if quoted else parse_scalar(event.value)
        tag = event.tag
        if self.foreign and tag == TEXT_TAG:
            tag, value, quoted = None, event.value, True
        elif self.foreign and tag in SCALAR_TAGS:
            typed = parse_scalar(event.value)
            if type(typed) in SCALAR_TAGS[tag]:
                tag, value = None, typed
        return Node(
            value, self.at(self.line), event.value, quoted, tag=self._unknown_tag(tag), anchor=event.anchor or ""
        )

    def _unknown_tag(self, tag: str | None) -> str:
        """Return a tag that says nothing here, which is a problem in a recipe; empty if there is none."""
        if tag in (None, "!"):
            return ""
        written = shorten(tag.replace("tag:yaml.org,2002:", "!!"))
        if not self.foreign:
            self._report(f"YAML tag {written} is not supported", "remove it")
        return written

    def _check_text(self, node: Node) -> None:
        # A surrogate such as "\uD800" can be neither printed nor encoded as UTF-8, and "\0" ends a path for the
        # operating system.
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in node.source):
            self._stop("an escape sequence that is not a valid character", "write the character itself")

    def _path(self) -> str:
        """Return the dotted path of the next value."""
        if not self._open:
            return ""
        parent = self._open[-1]
        if isinstance(parent.value, list):
            return f"{parent.path}[{len(parent.value)}]"
        key = parent.key.source if parent.key else ""
        return f"{parent.path}.{key}" if parent.path and key else parent.path or key

    def _report(self, message: str, fix: str) -> None:
        self.problems.append(Problem(self.at(self.line), self._path(), message, fix))

    def _stop(self, message: str, fix: str) -> NoReturn:
        raise UnreadableRecipe(Problem(self.at(self.line), self._path(), message, fix))


def _merge(entries: dict[str, Node], sections: list[Node]) -> None:
    """Add the keys of merged sections that `entries` does not have; the first section with a key wins."""
    for section in sections:
        if isinstance(section.value, dict):
            for key, node in section.value.items():
                entries.setdefault(key, node)


# PyYAML's message, our message, and the fix. PyYAML's messages describe its grammar, not the text. First match wins.
_SYNTAX_ERRORS = (
    (
        "mapping values are not allowed",
        "a `:` where no key is allowed",
        "check the indentation, or quote the value",
    ),
    ("could not find expected ':'", "a line that is neither `key: value` nor part of a list", "add the `:`"),
    ("expected <block end>, but found ':'", "a `:` without a key", "write the key before it"),
    ("expected <block end>, but found '-'", "a list item among keys", "indent it below the key it belongs to"),
    ("expected <block end>", "the indentation matches no line above", "indent it like the lines around it"),
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
        "a `-` where no list is allowed",
        "start the list on a new line",
    ),
    ("cannot start any token", "a character that cannot start a value", "put the value in quotes"),
)


def _syntax_problem(error: yaml.YAMLError, text: str, at: Callable[[int], Location]) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(at(line), "", f"a control character (U+{ord(text[error.position]):04X})", "remove it")
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(at(1), "", f"not valid YAML: {error}", "check it in an editor with YAML support")
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    indent = lines[line - 1][: -len(lines[line - 1].lstrip()) or None] if line <= len(lines) else ""
    if "\t" in indent:
        return Problem(at(line), "", "a tab in the indentation", "indent with spaces")
    problem = error.problem or error.context or ""
    for known, message, fix in _SYNTAX_ERRORS:
        if known in problem:
            # PyYAML reports an unclosed bracket or quote at the end of the file; the line of its start helps more.
            if "not closed" in message and error.context_mark:
                line = error.context_mark.line + 1
            return Problem(at(line), "", message, fix)
    return Problem(at(line), "", f"not valid YAML: {problem}", "check it in an editor with YAML support")
