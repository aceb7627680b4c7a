"""Suggest the right key for an unknown one: misspelled, in the wrong section, or another tool's name. No torch."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from lora_cli.recipe.other_tool_sources import RENAMED_IN_SOURCE, REPLACED_IN_SOURCE
from lora_cli.recipe.other_tool_values import BY_VALUE, fix_by_value, fix_of_renamed, fix_of_replaced
from lora_cli.recipe.other_tools import RENAMED, REPLACED, VALUES
from lora_cli.recipe.problem import join_words
from lora_cli.recipe.yaml_tree import PlainValue

JsonSchema = dict[str, Any]  # a JSON Schema, or a part of one


class Suggestion(NamedTuple):
    """How to fix an unknown key."""

    fix: str
    key: str = ""  # the suggested key, dotted; empty if none is known


def suggest(name: str, section: str, *, value: PlainValue, keys: list[str], recipe: JsonSchema) -> Suggestion:
    """Return the suggestion for the unknown key `name`.

    Args:
        name: the unknown key.
        section: the section that it is in, dotted; empty for the top level.
        value: its value.
        keys: the valid keys of that section.
        recipe: the JSON Schema of a recipe.
    """
    normalized = _normalize(name)
    valid = {_normalize(key): key for key in keys}
    if normalized in valid:
        return _use(valid[normalized], section)
    if section.endswith("]") and normalized in NORMALIZED_RENAMED_IN_SOURCE:
        key = NORMALIZED_RENAMED_IN_SOURCE[normalized]
        return Suggestion(
            _renamed(key, value, recipe["$defs"]["SourceSpec"]["properties"][key], recipe), f"{section}.{key}"
        )
    if section.endswith("]") and normalized in NORMALIZED_REPLACED_IN_SOURCE:
        return Suggestion(fix_of_replaced(NORMALIZED_REPLACED_IN_SOURCE[normalized], value))
    key = NORMALIZED_RENAMED.get(normalized, "")
    fix = fix_by_value(NORMALIZED_BY_VALUE.get(normalized, ""), value)
    if key and fix is None:
        fix = _renamed(key, value, _schema_of(key, recipe), recipe)
    if fix is not None:
        return Suggestion(fix, "" if fix.startswith("remove it") else key)
    if normalized in NORMALIZED_REPLACED:
        return Suggestion(fix_of_replaced(NORMALIZED_REPLACED[normalized], value))
    all_names = all_keys(recipe)
    if name in all_names:
        outer, _, inner = name.partition(".")
        return Suggestion(f"nest it: `{outer}: {{{inner}: ...}}`", name)
    elsewhere = [key for key in all_names if _normalize(key.rpartition(".")[2]) == normalized]
    if elsewhere:
        return Suggestion(f"move it to {join_words(elsewhere)}", elsewhere[0])
    if close := get_close_matches(normalized, valid, n=1, cutoff=0.6):
        return _use(valid[close[0]], section, sure=False)
    leaves = {_normalize(key.rpartition(".")[2]): key for key in all_names}
    if close := get_close_matches(normalized, leaves, n=1, cutoff=0.75):
        return Suggestion(f"did you mean {leaves[close[0]]}?", leaves[close[0]])
    return Suggestion(f"valid keys are {join_words(keys, 'and')}")


def _renamed(key: str, value: PlainValue, schema: JsonSchema, recipe: JsonSchema) -> str:
    accepted = alternatives(schema, recipe)
    kinds = {
        option["type"] for option in accepted if "type" in option and "enum" not in option and "const" not in option
    }
    choices = [
        str(each) for option in accepted for each in [*option.get("enum", ()), *filter(None, [option.get("const")])]
    ]
    known = None
    if isinstance(value, str):
        lower = value.lower()
        meant = VALUES.get(lower) or VALUES.get(lower.replace("-", "_")) or lower
        # A spelling that the key accepts anyway, such as `lora`, is not another name.
        known = meant if meant in choices else None
    return fix_of_renamed(key, value, kinds=kinds, choices=choices, known=known)


def _schema_of(key: str, recipe: JsonSchema) -> JsonSchema:
    section, _, leaf = key.rpartition(".")
    if not section:
        schema: JsonSchema = recipe["properties"][leaf]
        return schema
    parts = alternatives(recipe["properties"][section], recipe)
    return next(part["properties"][leaf] for part in parts if leaf in part.get("properties", {}))


def find_key(name: str, recipe: JsonSchema) -> str | None:
    """Return the dotted key that is called `name`, without its section or by another tool; None if there is none."""
    normalized = _normalize(name)
    leaves = [key for key in all_keys(recipe) if _normalize(key.rpartition(".")[2]) == normalized]
    return NORMALIZED_RENAMED.get(normalized) or next(iter(leaves), None)


def _use(key: str, section: str, *, sure: bool = True) -> Suggestion:
    dotted = f"{section}.{key}" if section else key
    return Suggestion(f"use {key}" if sure else f"did you mean {key}?", dotted)


def _normalize(name: str) -> str:
    """Return one form for `learning-rate`, `learningRate` and `Learning_Rate`."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def all_keys(recipe: JsonSchema) -> list[str]:
    """Return every dotted key of a recipe: its sections, and the keys in them."""
    keys = []
    for name, schema in recipe["properties"].items():
        keys.append(name)
        for part in alternatives(schema, recipe):
            keys += [f"{name}.{key}" for key in part.get("properties", {})]
    return keys


def alternatives(schema: JsonSchema, recipe: JsonSchema) -> list[JsonSchema]:
    """Return the alternatives (`anyOf`) of a schema, with references resolved."""
    if "$ref" in schema:
        return alternatives(recipe["$defs"][schema["$ref"].rpartition("/")[2]], recipe)
    if "anyOf" in schema:
        return [option for part in schema["anyOf"] for option in alternatives(part, recipe)]
    return [schema]


NORMALIZED_RENAMED = {_normalize(name): key for name, key in RENAMED.items()}
NORMALIZED_BY_VALUE = {_normalize(name): name for name in BY_VALUE}
NORMALIZED_REPLACED_IN_SOURCE = {_normalize(name): fix for name, fix in REPLACED_IN_SOURCE.items()}
NORMALIZED_REPLACED = {_normalize(name): fix for name, fix in REPLACED.items()}
NORMALIZED_RENAMED_IN_SOURCE = {_normalize(name): key for name, key in RENAMED_IN_SOURCE.items()}
