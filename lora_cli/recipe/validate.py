"""Validate a recipe's tree against the schema and the rules between fields: all problems, with lines. No torch."""

import re
from collections.abc import Iterator
from functools import cache

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_cli.recipe.explain import explain
from lora_cli.recipe.problem import Location, Problem
from lora_cli.recipe.rules import find_conflicts
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import JsonSchema, Suggestion, alternatives, suggest
from lora_cli.recipe.yaml_tree import Node, PlainValue

KeyPath = tuple[str | int, ...]  # ("data", "train", 0, "path"), printed as data.train[0].path


def validate_recipe(tree: Node, top: Location) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe, or None if it is invalid, and all its problems.

    Args:
        tree: the recipe as parsed.
        top: the location of problems that belong to no key.
    """
    by_path: dict[KeyPath, Problem] = {}
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        by_path = _schema_problems(error.errors(include_url=False), tree, top)
        recipe = None
    bad = set(by_path)
    for path, empty in _empty_values(tree, ()):
        if not any(path[: len(other)] == other and path != other for other in bad):
            unknown = path in by_path and by_path[path].message == UNKNOWN_KEY
            fix = "write one, or remove the key"
            by_path[path] = by_path[path] if unknown else _problem(path, empty.location, "has no value", fix)
    bad |= set(by_path)
    problems = [problem for problem in by_path.values() if problem.message]
    # Conflicts are reported in the same run: among the valid values, with defaults in place of the invalid ones.
    for conflict in find_conflicts(recipe or Recipe.model_validate(_without(tree, bad))):
        paths = [_parse_key(key) for key in (conflict.key, *conflict.depends_on)]
        if not any(path[: len(other)] == other[: len(path)] for path in paths for other in bad):
            locations = [node.location for path in paths if (node := _node_at(tree, path))]
            location = locations[0] if locations else top
            problems.append(Problem(location, conflict.key, conflict.message, conflict.fix))
    return (None if problems else recipe), problems


UNKNOWN_KEY = "unknown key"


@cache
def _recipe_schema() -> JsonSchema:
    return Recipe.model_json_schema()


def _schema_problems(errors: list[ErrorDetails], tree: Node, top: Location) -> dict[KeyPath, Problem]:
    """Return one problem for each value that pydantic rejects; the message comes from the JSON Schema."""
    schema = _recipe_schema()
    kinds: dict[KeyPath, str] = {}
    for error in errors:
        path = _path_in_tree(tree, error["loc"])
        if error["type"] == "missing":
            path = (*path, error["loc"][-1])
        kinds.setdefault(path, error["type"])
    # For a union, pydantic reports an error for each of its types; the error with the longest path fits best.
    innermost = [path for path in kinds if not any(path == other[: len(path)] != other for other in kinds)]
    suggestions: list[Suggestion] = []
    problems: dict[KeyPath, Problem] = {}
    for path in innermost:
        if kinds[path] == "extra_forbidden" and (node := _node_at(tree, path)):
            section = _schema_at(path[:-1], schema)
            keys = [key for option in alternatives(section, schema) for key in option.get("properties", ())]
            suggestions.append(_suggest(path, node, keys, schema))
            problems[path] = _problem(path, node.location, UNKNOWN_KEY, suggestions[-1].fix)
    for path in innermost:
        if kinds[path] == "missing":
            parent = _node_at(tree, path[:-1])
            location = parent.location if parent and len(path) > 1 else top
            key = _format_key(path)
            # `base_model:` is reported as an unknown key; that model.path is missing follows from it, so its message
            # is empty and is not printed.
            implied = any(f"{suggestion.key}.".startswith(f"{key}.") for suggestion in suggestions)
            fix = _how_to_add(path, schema)
            problems[path] = Problem(location, key, "" if implied else "missing", fix)
        elif kinds[path] != "extra_forbidden" and (node := _node_at(tree, path)):
            problems[path] = _problem(path, node.location, *explain(node, _schema_at(path, schema), schema))
    return problems


def _suggest(path: KeyPath, node: Node, keys: list[str], schema: JsonSchema) -> Suggestion:
    return suggest(str(path[-1]), _format_key(path[:-1]), value=node.plain(), keys=keys, recipe=schema)


def _how_to_add(path: KeyPath, schema: JsonSchema) -> str:
    field = _schema_at(path, schema)
    if required := [key for option in alternatives(field, schema) for key in option.get("required", ())]:
        return f"add `{path[-1]}: {{{required[0]}: ...}}`"
    description = str(field["description"]).rstrip(".")
    return f"add it: {description[0].lower()}{description[1:]}"


def _path_in_tree(node: Node, location: tuple[str | int, ...]) -> KeyPath:
    """Return pydantic's location without the names of union types in it, which are not in the tree."""
    path: list[str | int] = []
    for step in location:
        inner = _node_at(node, (step,))
        if inner is not None:
            node = inner
            path.append(step)
    return tuple(path)


def _node_at(node: Node, path: KeyPath) -> Node | None:
    """Return the value at `path`, or None if the tree has no such path."""
    for step in path:
        match node.value, step:
            case dict(entries), str(key) if key in entries:
                node = entries[key]
            case list(items), int(index) if index < len(items):
                node = items[index]
            case _:
                return None
    return node


def _schema_at(path: KeyPath, recipe: JsonSchema) -> JsonSchema:
    schema = recipe
    for step in path:
        for option in alternatives(schema, recipe):
            if isinstance(step, int) and "items" in option:
                schema = option["items"]
            elif step in option.get("properties", ()):
                schema = option["properties"][step]
            elif isinstance(option.get("additionalProperties"), dict):
                schema = option["additionalProperties"]
    return schema


def _empty_values(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
    """Yield keys without a value: YAML reads them as null, which some keys accept, but it was not written."""
    match node.value:
        case dict(entries):
            for key, inner in entries.items():
                yield from _empty_values(inner, (*path, key))
        case list(items):
            for index, inner in enumerate(items):
                yield from _empty_values(inner, (*path, index))
        case _ if node.is_empty:
            yield path, node


def _without(tree: Node, bad: set[KeyPath]) -> dict[str, PlainValue]:
    """Return the recipe without the fields that have problems, so that conflicts of the others can be found."""
    plain = tree.plain()
    assert isinstance(plain, dict), "load_recipe checks that the top level is a section"
    for section, *rest in bad:
        fields = plain.get(str(section))
        if rest and isinstance(fields, dict):
            fields.pop(str(rest[0]), None)
        else:
            plain.pop(str(section), None)
    for section, key in (("model", "path"), ("data", "train")):
        fields = plain.setdefault(section, {})
        assert isinstance(fields, dict), "a value in place of a section was removed above"
        fields.setdefault(key, "unnamed")
    if isinstance(fields := plain.get("tracking"), dict):
        fields.setdefault("to", ["tensorboard"])
    return plain


def _problem(path: KeyPath, location: Location, message: str, fix: str) -> Problem:
    return Problem(location, _format_key(path), message, fix)


def _format_key(path: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _parse_key(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))
