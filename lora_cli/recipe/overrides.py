"""Apply `--set section.key=value` overrides of the command line to the tree of a recipe. No torch."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe, shorten
from lora_cli.recipe.yaml_tree import MAX_DEPTH, Node, parse_yaml

# `Location.order` of the first override: problems of the command line are printed after those of the file.
AFTER_THE_FILE = 1_000_000_000
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


def apply_overrides(
    tree: Node, overrides: Sequence[str], problems: list[Problem], *, options: Mapping[str, str] = NO_OPTIONS
) -> tuple[Node, list[Problem]]:
    """Return the tree with each `key=value` applied, and the remaining problems.

    Args:
        tree: the recipe.
        overrides: texts such as `training.seed=1`; the value is YAML.
        problems: those of the file; problems of an overridden key are dropped.
        options: how those were written that are no `--set`, such as `--output runs/a`; for messages.
    """
    seen: set[str] = set()
    for number, text in enumerate(overrides):
        location = Location(AFTER_THE_FILE + number, options.get(text) or f"--set {shorten(text, 80)}")
        key, equals, written = (part.strip() for part in text.partition("="))
        steps = key.split(".")
        if not equals:
            problems.append(Problem(location, "", "missing `=`", "write it like training.learning_rate=1e-4"))
            continue
        if len(steps) > MAX_DEPTH or not all(re.fullmatch(r"[^\s\[\]]+", step) for step in steps):
            fix = "write section.key, such as training.learning_rate; set the entire list, not an entry by index"
            problems.append(Problem(location, "", f"'{shorten(key)}' is not a key", fix))
            continue
        if re.search("[\ud800-\udfff\\0]", text):
            fix = "write it in UTF-8, without NUL characters"
            problems.append(Problem(location, shorten(key), "has bytes that are not text", fix))
            continue
        if key in seen:
            problems.append(Problem(location, key, "set twice", "keep one"))
            continue
        seen.add(key)
        problems = [problem for problem in problems if not _is_at_or_below(problem.key, key)]
        try:
            value, value_problems = parse_yaml(written, _always(location))
            problems += [problem._replace(key=_join(key, problem.key)) for problem in value_problems]
            tree = _set_value(tree, steps, value or Node(None, location), parent="")
        except UnreadableRecipe as error:
            fix = error.problem.fix if written else "write a value after the `=`"
            if written.startswith(("*", "&", "!", "%", "@", "`")):  # as of `data.train=*.jsonl`; YAML has its own use
                setting = f'{key}="{written}"'
                fix = f"put it into quotes: --set {shlex.quote(setting)}"
            problems.append(error.problem._replace(key=_join(key, error.problem.key), fix=fix))
    return tree, problems


def _set_value(node: Node, steps: list[str], value: Node, parent: str) -> Node:
    """Return a copy of the tree with `value` at `steps`; the copy leaves nodes that YAML aliases share unchanged."""
    entries = {} if node.is_empty else node.value
    if not isinstance(entries, dict):
        message = f"{parent} is a {'list' if isinstance(entries, list) else 'single value'}, not a section"
        raise UnreadableRecipe(Problem(value.location, "", message, f"set all of it: --set {shlex.quote(parent)}=..."))
    first, *rest = steps
    if rest:
        # A section of the file keeps its line; a new one has the location of the override that adds it.
        section = entries.get(first, Node({}, value.location))
        value = _set_value(section, rest, value, f"{parent}.{first}".lstrip("."))
    return replace(node, value={**entries, first: value})


def _always(location: Location) -> Callable[[int], Location]:
    return lambda _: location


def _join(key: str, inner: str) -> str:
    return f"{key}{inner}" if inner.startswith("[") or not inner else f"{key}.{inner}"


def _is_at_or_below(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))
