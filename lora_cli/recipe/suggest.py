"""Suggest the right key for an unknown one: misspelled, in the wrong section, or another tool's name. No torch."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from lora_cli.recipe.other_tools import RENAMED, RENAMED_IN_SOURCE, REPLACED
from lora_cli.recipe.problem import join_words

JsonSchema = dict[str, Any]  # a JSON Schema, or a part of one


class Suggestion(NamedTuple):
    """How to fix an unknown key."""

    fix: str
    key: str = ""  # the suggested key, dotted; empty if none is known


def suggest(name: str, section: str, *, keys: list[str], recipe: JsonSchema) -> Suggestion:
    """Return the suggestion for the unknown key `name`.

    Args:
        name: the unknown key.
        section: the section that it is in, dotted; empty for the top level.
        keys: the valid keys of that section.
        recipe: the JSON Schema of a recipe.
    """
    normalized = _normalize(name)
    valid = {_normalize(key): key for key in keys}
    if normalized in valid:
        return _use(valid[normalized], section)
    if section.endswith("]") and normalized in NORMALIZED_RENAMED_IN_SOURCE:
        return _use(NORMALIZED_RENAMED_IN_SOURCE[normalized], section)
    if normalized in NORMALIZED_RENAMED:
        return Suggestion(f"use {NORMALIZED_RENAMED[normalized]}", NORMALIZED_RENAMED[normalized])
    if normalized in NORMALIZED_REPLACED:
        return Suggestion(NORMALIZED_REPLACED[normalized])
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
NORMALIZED_REPLACED = {_normalize(name): fix for name, fix in REPLACED.items()}
NORMALIZED_RENAMED_IN_SOURCE = {_normalize(name): key for name, key in RENAMED_IN_SOURCE.items()}
