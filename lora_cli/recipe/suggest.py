"""Find the key that was meant by an unknown one: misspelt, misplaced, or another tool's. No torch."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from lora_cli.recipe.other_tools import RENAMED, RENAMED_IN_SOURCE, REPLACED
from lora_cli.recipe.problem import join_words

JsonSchema = dict[str, Any]  # a JSON Schema, or a part of one


class Suggestion(NamedTuple):
    """What to do about an unknown key."""

    fix: str
    key: str = ""  # the key of ours that was meant, dotted, where it is known


def suggest(name: str, section: str, *, keys: list[str], recipe: JsonSchema) -> Suggestion:
    """What was meant by `name` in `section` (dotted; empty for the top), which has `keys`."""
    flat = _flat(name)
    here = {_flat(key): key for key in keys}
    if flat in here:
        return _is(here[flat], section)
    if section.endswith("]") and flat in RENAMED_FLAT_IN_SOURCE:
        return _is(RENAMED_FLAT_IN_SOURCE[flat], section)
    if flat in RENAMED_FLAT:
        return Suggestion(f"here it is {RENAMED_FLAT[flat]}", RENAMED_FLAT[flat])
    if flat in REPLACED_FLAT:
        return Suggestion(REPLACED_FLAT[flat])
    everywhere = all_keys(recipe)
    if name in everywhere:
        outer, _, inner = name.partition(".")
        return Suggestion(f"nest it: `{outer}: {{{inner}: ...}}`", name)
    elsewhere = [key for key in everywhere if _flat(key.rpartition(".")[2]) == flat]
    if elsewhere:
        return Suggestion(f"it belongs elsewhere: {join_words(elsewhere)}", elsewhere[0])
    if close := get_close_matches(flat, here, n=1, cutoff=0.6):
        return _is(here[close[0]], section, sure=False)
    leaves = {_flat(key.rpartition(".")[2]): key for key in everywhere}
    if close := get_close_matches(flat, leaves, n=1, cutoff=0.75):
        return Suggestion(f"did you mean {leaves[close[0]]}?", leaves[close[0]])
    return Suggestion(f"the keys here are {join_words(keys, 'and')}")


def _is(key: str, section: str, *, sure: bool = True) -> Suggestion:
    full = f"{section}.{key}" if section else key
    return Suggestion(f"here it is {key}" if sure else f"did you mean {key}?", full)


def _flat(name: str) -> str:
    """`learning-rate`, `learningRate` and `Learning_Rate` are one name."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def all_keys(recipe: JsonSchema) -> list[str]:
    """Every dotted key of a recipe, down to the keys of its sections."""
    keys = []
    for name, schema in recipe["properties"].items():
        keys.append(name)
        for part in alternatives(schema, recipe):
            keys += [f"{name}.{key}" for key in part.get("properties", {})]
    return keys


def alternatives(schema: JsonSchema, recipe: JsonSchema) -> list[JsonSchema]:
    """The alternatives of a schema, with references followed."""
    if "$ref" in schema:
        return alternatives(recipe["$defs"][schema["$ref"].rpartition("/")[2]], recipe)
    if "anyOf" in schema:
        return [option for part in schema["anyOf"] for option in alternatives(part, recipe)]
    return [schema]


RENAMED_FLAT = {_flat(name): key for name, key in RENAMED.items()}
REPLACED_FLAT = {_flat(name): fix for name, fix in REPLACED.items()}
RENAMED_FLAT_IN_SOURCE = {_flat(name): key for name, key in RENAMED_IN_SOURCE.items()}
