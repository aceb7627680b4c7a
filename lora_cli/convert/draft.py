"""The recipe that a conversion writes, and what became of each key of the other tool's config. No torch."""

from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

from lora_cli.convert.config import Config, Unreadable, leaves_of, show
from lora_cli.convert.secrets import hide
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.other_tool_values import asks_for_nothing
from lora_cli.recipe.schema import QuantizationSpec, Recipe


class Outcome(StrEnum):
    """What became of a key."""

    CARRIED = "carried"
    DEFAULT = "default"  # this tool does the same without the key, or the value asks for nothing
    NO_EFFECT = "no effect"  # on what is learnt
    NOT_OFFERED = "not offered"  # it changes what is learnt
    OTHER_TASK = "another task"  # no recipe can stand for it
    UNKNOWN = "unknown"


NEEDS_ACCEPTANCE = (Outcome.NOT_OFFERED, Outcome.UNKNOWN)


class Line(NamedTuple):
    """What became of one key of the config."""

    key: str
    value: Any
    outcome: Outcome
    to: str = ""  # key of the recipe, dotted
    result: Any = None  # its value
    reason: str = ""
    written: bool = True  # in the config

    def text(self) -> str:
        """Return it without its outcome: `lora_r: 8 -> adapter.rank: 8`."""
        value = show(hide(self.key, self.value))
        shown = self.value is not None or (self.written and not self.to)
        parts = f"{self.key}: {value}" if shown else self.key
        if self.to:
            parts += f" -> {self.to}: {show(hide(self.to, self.result))}"
        return f"{parts} — {self.reason}" if self.reason else parts


class Assumed(NamedTuple):
    """A default of the other tool that differs from this tool's, and so is written out."""

    to: str
    value: Any
    reason: str


class Draft:
    """The recipe under construction, by dotted key, and the lines of the report."""

    def __init__(self, tool: str, config: Config) -> None:
        self.tool, self.config = tool, config
        self.values: dict[str, Any] = {}
        self.comments: dict[str, str] = {}
        self.lines: dict[str, Line] = {}
        self.assumed: list[Assumed] = []

    def carry(self, key: str, to: str, value: Any, note: str = "") -> None:
        """Set the recipe's `to` from the config's `key`."""
        self.put(to, value, f"{key}; {note}" if note else key)
        self.carried(key, to, value, note)

    def carried(self, key: str, to: str, result: Any, note: str = "", *, computed: bool = False) -> None:
        """Add the line of a key that is carried, by whoever set `to`; with `computed`, also if a script computes it."""
        same = equals_default(to, result, method=self.values.get("adapter.method", "lora"))
        outcome = Outcome.DEFAULT if same and not note else Outcome.CARRIED
        used = ""  # the first call of a script that passes the argument
        for name in self.config.keys_of(key):
            if not (self.config.has(name) or (computed and self.config.is_written(name))):
                continue
            if used and self.config.raw(name) != self.config.raw(used):
                reason = f"differs from {used}, and a recipe has one value; accepted: that of {used}"
                self._line(name, Outcome.NOT_OFFERED, reason=reason)
            else:
                self._line(name, outcome, to=to, result=result, reason=note)
                used = used or name

    def put(self, to: str, value: Any, comment: str = "") -> None:
        """Set a key of the recipe."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        self.values[to] = value
        self.comments[to] = comment

    def assume(self, to: str, value: Any, why: str = "") -> None:
        """Set `to` to the other tool's default, unless the config set it, or this tool's default is the same."""
        method = self.values.get("adapter.method", "lora")
        if to in self.values or equals_default(to, value, method=method):
            return
        reason = f"{self.tool}'s default" + (f": {why}" if why else "")
        self.put(to, value, reason)
        self.assumed.append(Assumed(to, value, reason))

    def same(self, key: str, reason: str, *, computed: bool = False) -> None:
        """Note that this tool does the same without the key; with `computed`, also for a value that is not known."""
        for name in self.config.keys_of(key):
            if self.config.has(name) or (computed and self.config.is_written(name)):
                self._line(name, Outcome.DEFAULT, reason=reason)

    def no_effect(self, key: str, reason: str) -> None:
        """Note that the key has no effect on what is learnt; null is not a value."""
        if self.config.raw(key) is None:
            self._each(key, Outcome.DEFAULT, "not set")
        self._each(key, Outcome.NO_EFFECT, reason)

    def refuse(self, key: str, reason: str, *, always: bool = False) -> None:
        """Note that the key changes what is learnt and is not offered; a value that asks for nothing does not.

        Args:
            key: of the config.
            reason: what is not offered, and what is done if the user accepts that.
            always: also for false, null and 0.
        """
        for name in self.config.keys_of(key):
            if self.config.is_written(name):
                value = self.config.raw(name)
                nothing = not isinstance(value, Unreadable) and (asks_for_nothing(value) or value in ([], {}))
                if nothing and not always:
                    self._line(name, Outcome.DEFAULT, reason="asks for nothing")
                else:
                    self._line(name, Outcome.NOT_OFFERED, reason=reason)

    def other_task(self, key: str, reason: str, *, computed: bool = False) -> None:
        """Note that the config is for another task, which no recipe stands for; `computed` as in `same`."""
        if isinstance(self.config.raw(key), Unreadable) and not computed:
            return  # `finish` says that its value is not known
        if not self.config.is_written(key):
            self.lines[key] = Line(key, None, Outcome.OTHER_TASK, reason=reason, written=False)
        self._each(key, Outcome.OTHER_TASK, reason)

    def missing(self, key: str, reason: str) -> None:
        """Note that a key which is needed is missing, or that something is not in the config at all."""
        if not isinstance(self.config.raw(key), Unreadable):  # of which `finish` says that it is not known
            written = self.config.is_written(key)
            self.lines[key] = Line(key, None, Outcome.NOT_OFFERED, reason=reason, written=written)

    def extra(self, line: Line) -> None:
        """Add a line for a key of another file that the config names, such as dataset_info.json."""
        self.lines.setdefault(line.key, line)

    def _each(self, key: str, outcome: Outcome, reason: str) -> None:
        for name in self.config.keys_of(key):
            if self.config.is_written(name):
                self._line(name, outcome, reason=reason)

    def _line(self, name: str, outcome: Outcome, *, to: str = "", result: Any = None, reason: str = "") -> None:
        if name not in self.lines:
            self.lines[name] = Line(name, self.config.raw(name), outcome, to, result, reason)

    def has_line(self, key: str) -> bool:
        """Return whether the key has a line, or a section that it is in."""
        return any(above in self.lines for above in (key, *_above(key)))

    def finish(self, known: set[str]) -> None:
        """Add a line for each key of the config that has none: null, or unknown.

        Args:
            known: the keys of the other tool, for suggestions.
        """
        for key, value in self.config.leaves():
            if self.has_line(key):
                continue
            last = key.rpartition(".")[2]
            names = {strip_indices(key), last} if self.config.kind == "script" else {strip_indices(key)}
            anchor = self.config.anchor_above(key)
            if anchor and not known & set(_sections(strip_indices(key))):
                reason = f"is read where `{anchor}` names it, if it is not replaced there"
                self.lines[key] = Line(key, value, Outcome.NO_EFFECT, reason=reason)
            elif isinstance(value, Unreadable):
                why = "is computed by the script" if self.config.kind == "script" else "is not known here"
                reason = f"{why}: write its value; accepted: as if it were not there"
                self.lines[key] = Line(key, value, Outcome.NOT_OFFERED, reason=reason)
            elif names & known:
                if asks_for_nothing(value) or value in ([], {}):
                    reason = "not set" if value is None else "asks for nothing"
                    self.lines[key] = Line(key, value, Outcome.DEFAULT, reason=reason)
                else:
                    reason = f"is not carried with the other keys of this {self.config.kind}; accepted: without it"
                    self.lines[key] = Line(key, value, Outcome.NOT_OFFERED, reason=reason)
            elif any(done.startswith((f"{key}.", f"{key}[")) for done in self.lines):
                continue
            else:
                section = strip_indices(key.rpartition(".")[0])
                beside = {name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section}
                close = get_close_matches(last, beside or known, n=1, cutoff=0.75)
                reason = f"unknown key of {self.tool}" + (f"; did you mean {close[0]}?" if close else "")
                self.lines[key] = Line(key, value, Outcome.UNKNOWN, reason=reason)

    def in_order(self) -> list[Line]:
        """Return the lines in the order of the config's keys; those of other files come last."""
        order: dict[str, int] = {}  # of each key, and of the sections that it is in
        for index, (key, _) in enumerate(leaves_of(self.config.values)):
            for each in (key, *_above(key)):
                order.setdefault(each, index)
        return sorted(self.lines.values(), key=lambda line: order.get(line.key, len(order)))


def _above(key: str) -> list[str]:
    """Return the dotted keys of the sections and lists that a key is in."""
    return [key[:index] for index, character in enumerate(key) if character in ".["]


def _sections(key: str) -> list[str]:
    """Return a dotted key, and those of the sections that it is in."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def strip_indices(key: str) -> str:
    """Return a dotted key without the indices of lists: `datasets[0].path` is `datasets.path`."""
    return "".join(part.partition("]")[2] if "]" in part else part for part in key.replace("[", "\0[").split("\0"))


@cache
def _defaults() -> dict[str, Any]:
    recipe = Recipe.model_validate({"model": {"path": "x"}, "data": {"train": "x"}, "task": "seq-cls"})
    values = recipe.model_dump()
    sections = {name: keys for name, keys in values.items() if isinstance(keys, dict)}
    sections["quantization"] = QuantizationSpec.model_validate({}).model_dump(exclude={"bits"})
    flat = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    # The task above is one whose batches are counted in rows.
    return {**flat, "data.packing": True, "task": "causal-lm", "output": values["output"]}


def equals_default(key: str, value: Any, *, method: str = "lora") -> bool:
    """Return whether a recipe without the dotted `key` has this value in any case."""
    section, _, leaf = key.partition(".")
    if section == "adapter" and leaf != "method":
        return bool(METHOD_FACTS[method_name(method)].options.get(leaf) == value)
    return key in _defaults() and bool(_defaults()[key] == value)


def method_name(name: str) -> MethodName:
    """Return `name` as the name of an adapter method; lora if there is none of this name."""
    return next((method for method in METHOD_FACTS if method == name), "lora")
