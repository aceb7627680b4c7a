"""Say why a value does not fit its field, and what would: from the field's JSON Schema. No torch."""

import re
from difflib import get_close_matches
from typing import Any

from lora_cli.recipe.other_tools import VALUES
from lora_cli.recipe.problem import join_words, shorten
from lora_cli.recipe.suggest import JsonSchema, alternatives
from lora_cli.recipe.yaml_scalars import parse_scalar
from lora_cli.recipe.yaml_tree import Node

# What is meant where a single value stands for a section: `model: org/name` is its path.
MAIN_KEY = {
    "ModelSpec": "path",
    "AdapterSpec": "method",
    "QuantizationSpec": "bits",
    "DataSpec": "train",
    "SourceSpec": "path",
    "DistributedSpec": "processes",
}


def explain(node: Node, schema: JsonSchema, recipe: JsonSchema) -> tuple[str, str]:
    """What was found at a value that its field refuses, and what would fit."""
    fitting = alternatives(schema, recipe)
    fits = describe(fitting)
    sections = [option for option in fitting if "properties" in option]
    numbers = [option for option in fitting if option.get("type") in ("integer", "number") and not _choices(option)]
    choices = [choice for option in fitting for choice in _choices(option)]
    nullable = any(option.get("type") == "null" for option in fitting)
    is_text = any(option.get("type") == "string" and not _choices(option) for option in fitting)
    found = shorten(node.source)
    match node.value:
        case dict():
            lists = any("$ref" in option.get("items", {}) for option in fitting)
            return "a section where a value is due", "write it in a list: [{path: ...}]" if lists else fits
        case list():
            if sections:
                return "a list where a section is due", _some_keys(sections[0])
            return "a list where one value is due", fits
        case _ if sections:
            return _instead_of_section(node, sections[0])
        case False if nullable:
            return f"{found} is no choice", "write null for none"
        case int() | float() as number if numbers and not isinstance(number, bool):
            return _number(number, found, numbers[0]), describe([*numbers, *_nulls(fitting)])
        case None | bool() | int() | float():
            if is_text and node.value is not None:
                kind = "true or false" if isinstance(node.value, bool) else "a number"
                return f"{found} reads as {kind}, and text is due", f'put it in quotes: "{found}"'
            if choices and not numbers:
                return f"{found} is not {fits}", "write one of these"
            return f"{found} does not fit", fits
        case str() as word:
            return _text(word, node, fitting, numbers=bool(numbers), nullable=nullable)


def _text(word: str, node: Node, fitting: list[JsonSchema], *, numbers: bool, nullable: bool) -> tuple[str, str]:
    choices = [choice for option in fitting for choice in _choices(option)]
    fits = describe(fitting)
    if not word:
        return "an empty text", "write it out, or remove the key"
    found = f"'{shorten(word)}'"
    if nullable and word.lower() in ("none", "nil"):
        return f"{found} is a word", "write null for none"
    if numbers:
        kind = "a whole number" if any(option.get("type") == "integer" for option in fitting) else "a number"
        if node.quoted and not isinstance(parse_scalar(word), str):
            return f"{found} is text", "remove the quotes"
        if (meant := _meant_number(word)) is not None:
            return f"{found} is not {kind}", f"did you mean {meant}? ({fits})"
        if not choices:
            return f"{found} is not {kind}", fits
    if choices:
        if word in map(str, choices):
            return f"{found} is text", "remove the quotes"
        near = VALUES.get(word.lower()) or VALUES.get(word.lower().replace("-", "_"))
        close = [near] if near in choices else get_close_matches(word.lower(), map(str, choices), n=1)
        if numbers:
            return f"{found} does not fit", f"did you mean {close[0]}?" if close else fits
        only = f"write {fits}" if len(choices) == 1 else "write one of these"
        return f"{found} is not {fits}", f"did you mean {close[0]}?" if close else only
    if any("items" in option for option in fitting):
        return f"{found} is one value where a list is due", f"write [{shorten(word)}]"
    return f"{found} is one value where pairs are due", f"write {fits}"


def _meant_number(word: str) -> str | None:
    """The plain spelling of a number that is written in a way which YAML versions read differently."""
    if re.fullmatch(r"0[xob][0-9a-fA-F]+", word):
        try:
            return str(int(word, 0))
        except ValueError:
            return None
    if word.endswith("%") and isinstance(parse_scalar(word[:-1]), int | float):
        return f"{float(word[:-1]) / 100:g}"
    plain = word.replace("_", "").replace(",", "") if re.fullmatch(r"\d{1,3}([_,]\d{3})+", word) else word
    plain = re.sub(r"^([-+]?)0+(?=\d)", r"\1", plain)
    return plain if plain != word and not isinstance(parse_scalar(plain), str) else None


def _number(number: float, found: str, option: JsonSchema) -> str:
    """Why a number is refused by a field for numbers."""
    if number != number or number in (float("inf"), float("-inf")):
        return f"{found} is not finite"
    low = option.get("minimum", option.get("exclusiveMinimum"))
    high = option.get("maximum", option.get("exclusiveMaximum"))
    if low is not None and (number < low or number == option.get("exclusiveMinimum")):
        return f"{found} is too small"
    if high is not None and (number > high or number == option.get("exclusiveMaximum")):
        return f"{found} is too large"
    return f"{found} is not a whole number"


def _instead_of_section(node: Node, section: JsonSchema) -> tuple[str, str]:
    found = f"{shorten(node.source) or 'null'} where a section is due"
    key = MAIN_KEY.get(section.get("title", ""))
    if isinstance(node.value, str) and key:
        if key == "method" and node.value.lower() == "qlora":
            return found, "write `adapter: {method: lora}` and `quantization: {bits: 4}`"
        if key == "bits":
            bits = "8" if "8" in node.value else "4"
            return found, f"write {{bits: {bits}}}, or leave the section out for none"
        return found, f"write {{{key}: {shorten(node.value)}}}"
    if key == "bits":
        bits = str(node.value) if node.value in (4, 8) and node.value is not True else "4"
        return found, f"write {{bits: {bits}}}, or leave the section out for none"
    return found, _some_keys(section)


def _some_keys(section: JsonSchema) -> str:
    keys = list(section["properties"])
    return f"its keys are {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"


def describe(fitting: list[JsonSchema]) -> str:
    """What fits one of the alternatives, in words."""
    choices = [str(choice) for option in fitting for choice in _choices(option)]
    kinds = [_kind(option) for option in fitting if not _choices(option) and option.get("type") != "null"]
    ends = ["null"] if _nulls(fitting) else []
    # "a whole number, at least 1, or null": where a part has commas of its own, each "or" is written.
    parts = [*choices, *kinds, *ends]
    spaced = any("," in part or " and " in part for part in kinds)
    return ", or ".join(parts) if spaced else join_words(parts)


def _kind(option: JsonSchema) -> str:
    if "properties" in option:
        return f"a section with the keys {join_words(list(option['properties']), 'and')}"
    match option.get("type"):
        case "integer" | "number" as kind:
            return ("a whole number" if kind == "integer" else "a number") + _range(option)
        case "array":
            kinds = {"string": "a list of texts", "integer": "a list of whole numbers"}
            return kinds.get(option["items"].get("type"), "a list of sources")
        case "object":
            number = option["additionalProperties"].get("type") != "string"
            return f"pairs such as {'{down_proj: 32}' if number else '{prompt: question}'}"
        case _:
            return "text"


def _range(option: JsonSchema) -> str:
    if "minimum" in option and "maximum" in option:
        return f" from {option['minimum']:g} to {option['maximum']:.10g}"
    bounds = [
        f"{word} {option[name]:g}" if isinstance(option[name], float) else f"{word} {option[name]}"
        for name, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in option
    ]
    comma = "," if "minimum" in option else ""
    return f"{comma} {join_words(bounds, 'and')}" if bounds else ""


def _choices(option: JsonSchema) -> list[Any]:
    if option.get("type") == "boolean":
        return ["true", "false"]
    return [option["const"]] if "const" in option else list(option.get("enum", ()))


def _nulls(fitting: list[JsonSchema]) -> list[JsonSchema]:
    return [option for option in fitting if option.get("type") == "null"]
