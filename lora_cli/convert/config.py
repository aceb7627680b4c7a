"""A config of another tool as read: its keys, their values, and where each is written. No torch."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.recipe.field_types import parse_switch

MAX_DEPTH = 16  # of sections and lists within each other, as in YAML
MISSING = object()  # a key that the config does not have, where null is a value


class Unreadable(str):
    """The text of a value that only the other tool would know: an expression of a script, `$NAME`, `!tag x`."""


class Replaced(NamedTuple):
    """A value that is written, and that the other tool does not use."""

    key: str  # with what tells it from the key that is used
    value: Any
    place: str
    reason: str


@dataclass(frozen=True)
class Config:
    """The keys of another tool's config."""

    file: Path
    values: Mapping[str, Any]  # nested, as the file has them
    kind: str = "config"  # config, script (Python) or command line
    places: Mapping[str, str] = field(default_factory=dict)  # "file:line" of a key
    replaced: Sequence[Replaced] = ()
    # Of keys whose value is used elsewhere: what stands for it there, `*name` or `${key}`.
    anchors: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, list[str]] = field(default_factory=dict)  # of a script: `r` is at `get_peft_model.r`
    program: str = ""  # of a command line, or the library that a script imports
    # What functions of a script make of its rows, by the key of the step (script_rows.py).
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def keys_of(self, key: str) -> list[str]:
        """Return the keys in the file that `key` stands for: several if calls of a script pass the same one."""
        return list(self.aliases.get(key, [key]))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key; `default` if the config does not have it, or a script computes it."""
        value = self.raw(key, default)
        return default if isinstance(value, Unreadable) else value

    def raw(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key, also one that a script computes."""
        for name in self.keys_of(key):
            value: Any = self.values
            for part in split_key(name):
                inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
                if part not in inner:
                    break
                value = inner[part]
            else:
                return value
        return default

    def has(self, key: str) -> bool:
        """Return whether the config has a value for the key, also null."""
        return self.get(key, MISSING) is not MISSING

    def is_written(self, key: str) -> bool:
        """Return whether the config has the key, also with a value that a script computes."""
        return self.raw(key, MISSING) is not MISSING

    def anchor_above(self, key: str) -> str:
        """Return what stands elsewhere in the config for a value that a key is a part of; empty for nothing."""
        return next(
            (name for above, name in self.anchors.items() if f"{key}.".startswith((f"{above}.", f"{above}["))), ""
        )

    def place(self, key: str) -> str:
        """Return where a key is written."""
        return self.places.get(key, str(self.file))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yield each key that has a value of its own, dotted; lists of sections are entered, other lists are values."""
        yield from leaves_of(self.values)

    def number(self, key: str) -> float | None:
        """Return a number, None if the key is missing or null.

        Raises:
            LoraError: the value is not a number.
        """
        value = self.get(key)
        if value is None:
            return None
        number = as_number(value)
        if number is None:
            raise self.error(key, "not a number")
        return number

    def whole(self, key: str) -> int | None:
        """Return an integer, None if the key is missing or null.

        Raises:
            LoraError: the value is not an integer.
        """
        number = self.number(key)
        if number is not None and not float(number).is_integer():
            raise self.error(key, "not an integer")
        return None if number is None else int(number)

    def count(self, key: str, default: int) -> int:
        """Return an integer above 0, `default` if the key is missing or null.

        Raises:
            LoraError: the value is not such an integer.
        """
        number = self.whole(key)
        if number is not None and number < 1:
            raise self.error(key, "not above 0")
        return default if number is None else number

    def switch(self, key: str, *, default: bool = False) -> bool:
        """Return a boolean, `default` if the key is missing or null.

        Raises:
            LoraError: the value is not a boolean.
        """
        value = as_switch(self.get(key))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "not a boolean")
        return value

    def text(self, key: str) -> str | None:
        """Return a text, None if the key is missing, null or empty.

        Raises:
            LoraError: the value is a list or a section.
        """
        value = self.get(key)
        if isinstance(value, list | dict):
            raise self.error(key, "not a single value")
        return None if value is None or value == "" else str(value)

    def section(self, key: str) -> dict[str, Any]:
        """Return a section; an empty one if the key is missing or null.

        Raises:
            LoraError: the value is none.
        """
        value = self.get(key)
        if value in (None, ""):
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "not a section")
        return dict(value)

    def names(self, key: str) -> list[str]:
        """Return the keys of a section, such as the calls of a script; none of what is no section."""
        value = self.get(key)
        return [str(name) for name in value] if isinstance(value, dict) else []

    def error(self, key: str, problem: str) -> LoraError:
        """Return the error of a value that its key cannot have."""
        name = next((name for name in self.keys_of(key) if name in self.places), key)
        return LoraError(f"{self.place(name)}: {name}: {show(self.get(key))} is {problem}", hint="correct it first")


def is_deep(value: Any) -> bool:
    """Return whether sections and lists are nested in a value deeper than MAX_DEPTH, beyond which they are a text."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [each.values() if isinstance(each, Mapping) else each for each in level if _is_nest(each)]
        level = [part for parts in inner for part in parts]
    return bool(level)


def _is_nest(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple | set)


def unused_key(key: str, *known: Mapping[str, Any]) -> str:
    """Return a key that none of the sections has: `key`, `key again`, `key again 3`, ..."""
    count, name = 1, key
    while any(name in each for each in known):
        count += 1
        name = f"{key} again" + (f" {count}" if count > 2 else "")
    return name


def known_values(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section whose value is known."""
    return {key: value for key, value in section.items() if not isinstance(value, Unreadable)}


def leaves_of(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in `values` that is neither a section nor a list of sections."""
    if isinstance(values, Mapping) and (values or not prefix):
        for key, value in values.items():
            yield from leaves_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and values and all(isinstance(item, dict) for item in values):
        for index, item in enumerate(values):
            yield from leaves_of(item, f"{prefix}[{index}]")
    else:
        yield prefix, values


def split_key(key: str) -> list[str | int]:
    """Return the steps of a dotted key: `datasets[0].path` has three."""
    steps: list[str | int] = []
    for part in key.split("."):
        name, *indices = part.split("[")
        steps += [name, *(int(index.rstrip("]")) for index in indices if index.rstrip("]").isdigit())]
    return steps


def as_number(value: Any) -> float | None:
    """Return a number, also from a text such as `2e-4` or `10_000`; None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if re.match(r"[-+]?0\d", str(value)):
        return None  # YAML 1.1 reads 010 as 8, and Python as 10
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if isinstance(value, float):
        return value
    return int(number) if number.is_integer() and "." not in str(value) and "e" not in str(value).lower() else number


def as_switch(value: Any) -> Any:
    """Return the boolean that a text such as `True` or `no` means; other values unchanged."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return parse_switch(value)


def as_list(value: Any) -> list[Any]:
    """Return a list, also from a text with commas; a single value as a list of one, null as an empty list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def show(value: Any, limit: int = 60) -> str:
    """Return a value for a line of the report, in YAML's spelling."""
    if isinstance(value, Unreadable):
        text = f"`{value}`"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    elif isinstance(value, float):
        text = f"{value:.12g}"
    else:
        text = str(value) if value != "" else '""'
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
