"""Lay the `--set section.key=value` of the command line over the tree of a recipe. No torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe, shorten
from lora_cli.recipe.yaml_tree import MAX_DEPTH, Node, parse_yaml

# Problems of the command line are shown after those of the file.
AFTER_THE_FILE = 1_000_000_000


def apply_overrides(tree: Node, overrides: Sequence[str], problems: list[Problem]) -> tuple[Node, list[Problem]]:
    """The tree with each `key=value` in place, and the problems that remain: an overridden value has none."""
    seen: set[str] = set()
    for number, text in enumerate(overrides):
        place = Location(AFTER_THE_FILE + number, f"--set {shorten(text, 80)}")
        key, equals, written = (part.strip() for part in text.partition("="))
        steps = key.split(".")
        if not equals:
            problems.append(Problem(place, "", "no `=`", "write it as training.learning_rate=1e-4"))
            continue
        if len(steps) > MAX_DEPTH or not all(re.fullmatch(r"[^\s\[\]]+", step) for step in steps):
            fix = "write it as section.key, as in training.learning_rate; a list is set as a whole"
            problems.append(Problem(place, "", f"'{shorten(key)}' is no key", fix))
            continue
        if key in seen:
            problems.append(Problem(place, key, "set twice", "keep one --set of it"))
            continue
        seen.add(key)
        problems = [problem for problem in problems if not _within(problem.key, key)]
        try:
            value, found = parse_yaml(written, _always(place))
            problems += [problem._replace(key=_join(key, problem.key)) for problem in found]
            tree = _put(tree, steps, value or Node(None, place), above="")
        except UnreadableRecipe as error:
            fix = error.problem.fix if written else "write a value after the `=`"
            problems.append(error.problem._replace(key=_join(key, error.problem.key), fix=fix))
    return tree, problems


def _put(node: Node, steps: list[str], value: Node, above: str) -> Node:
    """A copy of the tree with `value` at the end of `steps`: what aliases share stays as it was."""
    entries = {} if node.is_empty else node.value
    if not isinstance(entries, dict):
        found = f"{above} is a {'list' if isinstance(entries, list) else 'single value'}, not a section"
        raise UnreadableRecipe(Problem(value.place, "", found, f"set it as a whole: --set {above}=..."))
    first, *rest = steps
    if rest:
        # A section that the file has keeps its line; one that it has not is where its first key is set.
        section = entries.get(first, Node({}, value.place))
        value = _put(section, rest, value, f"{above}.{first}".lstrip("."))
    return replace(node, value={**entries, first: value})


def _always(place: Location) -> Callable[[int], Location]:
    return lambda _: place


def _join(key: str, inner: str) -> str:
    return f"{key}{inner}" if inner.startswith("[") or not inner else f"{key}.{inner}"


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))
