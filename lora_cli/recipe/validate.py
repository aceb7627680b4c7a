"""Check a tree against the schema and the rules: every problem, each at its line. No torch."""

import re
from collections.abc import Iterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_cli.recipe.explain import explain
from lora_cli.recipe.problem import Location, Problem
from lora_cli.recipe.rules import conflicts
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import JsonSchema, Suggestion, alternatives, suggest
from lora_cli.recipe.yaml_tree import Node, PlainValue

KeyPath = tuple[str | int, ...]  # ("data", "train", 0, "path"), shown as data.train[0].path


def validate_recipe(tree: Node, top: Location) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that the tree spells, or None, and everything that is wrong with it."""
    found: dict[KeyPath, Problem] = {}
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        found = _refused_by_schema(error.errors(include_url=False), tree, top)
        recipe = None
    bad = set(found)
    for steps, blank in _blanks(tree, ()):
        if not any(steps[: len(other)] == other and steps != other for other in bad):
            unknown = steps in found and found[steps].found == UNKNOWN_KEY
            fix = "write one, or remove the key"
            found[steps] = found[steps] if unknown else _problem(steps, blank.place, "has no value", fix)
    bad |= set(found)
    problems = [problem for problem in found.values() if problem.found]
    # Rules between fields are told as well: over what stands, with defaults in place of what does not.
    for conflict in conflicts(recipe or Recipe.model_validate(_healed(tree, bad))):
        keys = [_steps(key) for key in (conflict.key, *conflict.depends_on)]
        if not any(key[: len(other)] == other[: len(key)] for key in keys for other in bad):
            places = [node.place for key in keys if (node := _at(tree, key))]
            place = places[0] if places else top
            problems.append(Problem(place, conflict.key, conflict.found, conflict.fix))
    return (None if problems else recipe), problems


UNKNOWN_KEY = "unknown key"


def _refused_by_schema(errors: list[ErrorDetails], tree: Node, top: Location) -> dict[KeyPath, Problem]:
    """One problem for each value that pydantic refuses; it says where, the JSON Schema says why."""
    schema = Recipe.model_json_schema()
    kinds: dict[KeyPath, str] = {}
    for error in errors:
        steps = _trace(tree, error["loc"])
        if error["type"] == "missing":
            steps = (*steps, error["loc"][-1])
        kinds.setdefault(steps, error["type"])
    # A union tells what is wrong with the value for each of its types; the one that looked inside fits best.
    inner = [steps for steps in kinds if not any(steps == other[: len(steps)] != other for other in kinds)]
    named: list[Suggestion] = []
    problems: dict[KeyPath, Problem] = {}
    for steps in inner:
        if kinds[steps] == "extra_forbidden" and (node := _at(tree, steps)):
            section = _schema_at(steps[:-1], schema)
            keys = [key for option in alternatives(section, schema) for key in option.get("properties", ())]
            named.append(suggest(str(steps[-1]), _key(steps[:-1]), keys=keys, recipe=schema))
            problems[steps] = _problem(steps, node.place, UNKNOWN_KEY, named[-1].fix)
    for steps in inner:
        if kinds[steps] == "missing":
            parent = _at(tree, steps[:-1])
            place = parent.place if parent and len(steps) > 1 else top
            key = _key(steps)
            # `base_model:` is told as the unknown key that it is: that model.path is missing follows from it.
            told = any(f"{meaning.key}.".startswith(f"{key}.") for meaning in named)
            fix = _how_to_add(steps, schema)
            problems[steps] = Problem(place, key, "" if told else "missing", fix)
        elif kinds[steps] != "extra_forbidden" and (node := _at(tree, steps)):
            problems[steps] = _problem(steps, node.place, *explain(node, _schema_at(steps, schema), schema))
    return problems


def _how_to_add(steps: KeyPath, schema: JsonSchema) -> str:
    field = _schema_at(steps, schema)
    if required := [key for option in alternatives(field, schema) for key in option.get("required", ())]:
        return f"add `{steps[-1]}: {{{required[0]}: ...}}`"
    description = str(field["description"]).rstrip(".")
    return f"add it: {description[0].lower()}{description[1:]}"


def _trace(node: Node, location: tuple[str | int, ...]) -> KeyPath:
    """The part of pydantic's location that is in the tree: between, it names the types of a union."""
    steps: list[str | int] = []
    for step in location:
        inner = _at(node, (step,))
        if inner is not None:
            node = inner
            steps.append(step)
    return tuple(steps)


def _at(node: Node, steps: KeyPath) -> Node | None:
    """The value at the end of `steps`, None where there is none."""
    for step in steps:
        match node.value, step:
            case dict(entries), str(key) if key in entries:
                node = entries[key]
            case list(items), int(index) if index < len(items):
                node = items[index]
            case _:
                return None
    return node


def _schema_at(steps: KeyPath, recipe: JsonSchema) -> JsonSchema:
    schema = recipe
    for step in steps:
        for option in alternatives(schema, recipe):
            if isinstance(step, int) and "items" in option:
                schema = option["items"]
            elif step in option.get("properties", ()):
                schema = option["properties"][step]
            elif isinstance(option.get("additionalProperties"), dict):
                schema = option["additionalProperties"]
    return schema


def _blanks(node: Node, steps: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
    """Values that were left out behind their key: null by accident, and null often means `never`."""
    match node.value:
        case dict(entries):
            for key, inner in entries.items():
                yield from _blanks(inner, (*steps, key))
        case list(items):
            for index, inner in enumerate(items):
                yield from _blanks(inner, (*steps, index))
        case _ if node.is_empty:
            yield steps, node


def _healed(tree: Node, bad: set[KeyPath]) -> dict[str, PlainValue]:
    """The recipe without the fields that have problems, so that the others can be seen together."""
    plain = tree.plain()
    assert isinstance(plain, dict), "the top was checked to be a section"
    for section, *rest in bad:
        fields = plain.get(str(section))
        if rest and isinstance(fields, dict):
            fields.pop(str(rest[0]), None)
        else:
            plain.pop(str(section), None)
    for section, key in (("model", "path"), ("data", "train")):
        fields = plain.setdefault(section, {})
        assert isinstance(fields, dict), "a section that is none was dropped above"
        fields.setdefault(key, "unnamed")
    return plain


def _problem(steps: KeyPath, place: Location, found: str, fix: str) -> Problem:
    return Problem(place, _key(steps), found, fix)


def _key(steps: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _steps(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))
