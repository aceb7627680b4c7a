"""`lora schema`: the JSON Schema of a recipe, or type, range, default and description of one key. No torch."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.recipe.dump import recipe_schema
from lora_cli.recipe.explain import describe
from lora_cli.recipe.suggest import JsonSchema, all_keys, alternatives, find_key, suggest
from lora_cli.run import console


def find_field(key: str) -> JsonSchema:
    """Return the JSON Schema of a section or a key, with the definitions that it refers to.

    Keys of a dataset source are below `data.train` and `data.eval`: `data.train.weight`.

    Raises:
        LoraError: there is no such key.
    """
    recipe = recipe_schema()
    field: JsonSchema = recipe
    steps = re.sub(r"\[\d*\]", "", key).split(".")
    for number, step in enumerate(steps):
        found = _properties(field, recipe)
        if step not in found:
            raise _unknown(key, ".".join(steps[:number]), step, found, recipe)
        field = found[step]
    return {**field, "$defs": used} if (used := _definitions(field, recipe)) else field


def show_field(key: str, field: JsonSchema) -> None:
    """Print a field as text: what it accepts, its default, what it does; the keys of a section, one a line."""
    for line in _lines(key, field):
        console.out.print(line)


def _lines(key: str, field: JsonSchema) -> Iterator[str]:
    recipe = recipe_schema()
    yield key
    keys = _properties(field, recipe)
    sections = [option for option in alternatives(field, recipe) if "properties" in option]
    if description := field.get("description") or next((each.get("description") for each in sections), None):
        yield from (f"  {line.strip()}" for line in str(description).splitlines() if line.strip())
    if sections:
        if "default" in field and field["default"] is None:
            yield "  default: null (left out)"
        required = [name for section in sections for name in section.get("required", ())]
        for name, inner in keys.items():
            default = _default(inner, required=name in required)
            yield f"  {name}: {_type(inner, recipe)}{'; ' if default else ''}{default}"
        return
    yield f"  type: {_type(field, recipe)}"
    if default := _default(field, required="default" not in field):
        yield f"  {default}"
    if keys:  # of the entries of a list
        yield f"  keys of an entry: {', '.join(keys)}"


def _type(field: JsonSchema, recipe: JsonSchema) -> str:
    return describe(alternatives(field, recipe))


def _default(field: JsonSchema, *, required: bool) -> str:
    """Return the default in words; empty if it is null and the description says what that means."""
    if field.get("default", ...) is None and "Default" in field.get("description", ""):
        return ""
    return f"default: {_as_yaml(field['default'])}" if "default" in field else "required" if required else ""


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_as_yaml(each)}" for name, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _properties(field: JsonSchema, recipe: JsonSchema) -> dict[str, JsonSchema]:
    """Return the keys of a section, or of the entries of a list."""
    found: dict[str, JsonSchema] = {}
    for option in alternatives(field, recipe):
        found |= option.get("properties", {})
        if isinstance(option.get("items"), dict):
            found |= _properties(option["items"], recipe)
    return found


def _definitions(field: Any, recipe: JsonSchema) -> dict[str, JsonSchema]:
    """Return the definitions that a schema refers to, and those that these refer to."""
    names: dict[str, JsonSchema] = {}
    waiting = [field]
    while waiting:
        match waiting.pop():
            case {"$ref": str(reference), **rest}:
                name = reference.rpartition("/")[2]
                if name not in names:
                    names[name] = recipe["$defs"][name]
                    waiting.append(names[name])
                waiting += rest.values()
            case dict(entries):
                waiting += entries.values()
            case list(items):
                waiting += items
    return names


def _unknown(key: str, section: str, step: str, known: dict[str, JsonSchema], recipe: JsonSchema) -> LoraError:
    if not known:
        return LoraError(f"{key} is not a key of a recipe: {section} has no keys", hint=f"lora schema {section}")
    found = suggest(step, section, value=None, keys=list(known), recipe=recipe).key or find_key(step, recipe)
    # The name of its section alone would make any key close to those in it.
    close = [found] if found else [] if section else get_close_matches(key, all_keys(recipe), n=1)
    where = f"the keys of {section} are {', '.join(known)}" if section else f"its sections are {', '.join(known)}"
    return LoraError(f"a recipe has no key {key}", hint=f"did you mean {close[0]}?" if close else where)
