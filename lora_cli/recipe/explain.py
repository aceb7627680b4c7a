"""Explain why a value does not match its field's type or range, and how to fix it, from the JSON Schema. No torch."""

import re
from difflib import get_close_matches
from typing import Any

from lora_cli.recipe.other_tools import VALUES
from lora_cli.recipe.problem import join_words, shorten
from lora_cli.recipe.suggest import JsonSchema, alternatives
from lora_cli.recipe.yaml_scalars import parse_scalar
from lora_cli.recipe.yaml_tree import Node

# The key that a single value in place of a section most likely belongs to: `model: org/name` is model.path.
MAIN_KEY = {
    "ModelSpec": "path",
    "AdapterSpec": "method",
    "QuantizationSpec": "bits",
    "DataSpec": "train",
    "SourceSpec": "path",
    "DistributedSpec": "processes",
    "PerformanceSpec": "kernels",
    "TrackingSpec": "to",
}


def explain(node: Node, schema: JsonSchema, recipe: JsonSchema) -> tuple[str, str]:
    """Return the message and the fix for a value that its field does not accept.

    Args:
        node: the value.
        schema: the JSON Schema of its field.
        recipe: the JSON Schema of a recipe, which `schema` refers to.
    """
    accepted = alternatives(schema, recipe)
    expected = describe(accepted)
    sections = [option for option in accepted if "properties" in option]
    numbers = [option for option in accepted if option.get("type") in ("integer", "number") and not _choices(option)]
    choices = [choice for option in accepted for choice in _choices(option)]
    nullable = bool(_nulls(accepted))
    is_text = any(option.get("type") == "string" and not _choices(option) for option in accepted)
    written = shorten(node.source)
    match node.value:
        case dict():
            lists = any("$ref" in option.get("items", {}) for option in accepted)
            fix = "write a list: [{path: ...}]" if lists else f"write {expected}"
            return "a section where a single value is expected", fix
        case list():
            if sections:
                return "a list where a section is expected", _some_keys(sections[0])
            return "a list where a single value is expected", f"write {expected}"
        case _ if sections:
            return _value_for_section(node, sections[0])
        case False if nullable:
            return f"{written} is not accepted", "write null for none"
        case int() | float() as number if numbers and not isinstance(number, bool):
            return _number(number, written, numbers[0]), f"write {describe([*numbers, *_nulls(accepted)])}"
        case None | bool() | int() | float():
            if is_text and node.value is not None:
                kind = "a boolean" if isinstance(node.value, bool) else "a number"
                return f"{written} is read as {kind}, but a string is expected", f'put it in quotes: "{written}"'
            if choices and not numbers:
                return f"{written} is not {expected}", "write one of these"
            return f"{written} is not accepted", f"write {expected}"
        case str() as text:
            return _text(text, node, accepted, numbers=bool(numbers), nullable=nullable)


def _text(text: str, node: Node, accepted: list[JsonSchema], *, numbers: bool, nullable: bool) -> tuple[str, str]:
    choices = [choice for option in accepted for choice in _choices(option)]
    expected = describe(accepted)
    if not text:
        return "an empty string", "write a value, or remove the key"
    written = f"'{shorten(text)}'"
    if nullable and text.lower() in ("none", "nil"):
        return f"{written} is read as a string", "write null for none"
    if numbers:
        kind = "an integer" if any(option.get("type") == "integer" for option in accepted) else "a number"
        if node.quoted and not isinstance(parse_scalar(text), str):
            return f"{written} is a string", "remove the quotes"
        if (meant := _meant_number(text)) is not None:
            return f"{written} is not {kind}", f"did you mean {meant}? ({expected})"
        if not choices:
            return f"{written} is not {kind}", f"write {expected}"
    if choices:
        if text in map(str, choices):
            return f"{written} is a string", "remove the quotes"
        known = VALUES.get(text.lower()) or VALUES.get(text.lower().replace("-", "_"))
        close = [known] if known in choices else get_close_matches(text.lower(), map(str, choices), n=1)
        if numbers:
            return f"{written} is not accepted", f"did you mean {close[0]}?" if close else f"write {expected}"
        other = f"write {expected}" if len(choices) == 1 else "write one of these"
        return f"{written} is not {expected}", f"did you mean {close[0]}?" if close else other
    if any("items" in option for option in accepted):
        return f"{written} is a single value where a list is expected", f"write [{shorten(text)}]"
    return f"{written} is a single value where a mapping is expected", f"write {expected}"


def _meant_number(text: str) -> str | None:
    """Return the decimal form of a number in a notation that YAML versions read differently, or None."""
    if re.fullmatch(r"0[xob][0-9a-fA-F]+", text):
        try:
            return str(int(text, 0))
        except ValueError:
            return None
    if text.endswith("%") and isinstance(parse_scalar(text[:-1]), int | float):
        return f"{float(text[:-1]) / 100:g}"
    plain = text.replace("_", "").replace(",", "") if re.fullmatch(r"\d{1,3}([_,]\d{3})+", text) else text
    plain = re.sub(r"^([-+]?)0+(?=\d)", r"\1", plain)
    return plain if plain != text and not isinstance(parse_scalar(plain), str) else None


def _number(number: float, written: str, option: JsonSchema) -> str:
    """Return the message for a number that a numeric field does not accept."""
    if number != number or number in (float("inf"), float("-inf")):
        return f"{written} is not finite"
    low = option.get("minimum", option.get("exclusiveMinimum"))
    high = option.get("maximum", option.get("exclusiveMaximum"))
    if low is not None and (number < low or number == option.get("exclusiveMinimum")):
        return f"{written} is too small"
    if high is not None and (number > high or number == option.get("exclusiveMaximum")):
        return f"{written} is too large"
    return f"{written} is not an integer"


def _value_for_section(node: Node, section: JsonSchema) -> tuple[str, str]:
    message = f"{shorten(node.source) or 'null'} where a section is expected"
    key = MAIN_KEY.get(section.get("title", ""))
    if isinstance(node.value, str) and key:
        if key == "method" and node.value.lower() == "qlora":
            return message, "write `adapter: {method: lora}` and `quantization: {bits: 4}`"
        if key == "bits":
            return message, _bits_fix("8" if "8" in node.value else "4")
        value = shorten(node.value)
        listed = section["properties"][key].get("type") == "array"
        return message, f"write {{{key}: {f'[{value}]' if listed else value}}}"
    if key == "bits":
        return message, _bits_fix(str(node.value) if node.value in (4, 8) and node.value is not True else "4")
    return message, _some_keys(section)


def _bits_fix(bits: str) -> str:
    return f"write {{bits: {bits}}}, or remove the section for no quantization"


def _some_keys(section: JsonSchema) -> str:
    keys = list(section["properties"])
    return f"its keys are {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"


def describe(accepted: list[JsonSchema]) -> str:
    """Return the accepted values in words: `an integer of at least 1, or null`."""
    choices = [str(choice) for option in accepted for choice in _choices(option)]
    kinds = [_kind(option) for option in accepted if not _choices(option) and option.get("type") != "null"]
    ends = ["null"] if _nulls(accepted) else []
    parts = [*choices, *kinds, *ends]
    # After a range or an enumeration, a comma shows where the part ends: "an integer of at least 1, or null".
    compound = any(map(_range, accepted)) or any("," in part or " and " in part for part in kinds)
    return ", or ".join(parts) if compound else join_words(parts)


def _kind(option: JsonSchema) -> str:
    if "properties" in option:
        return f"a section with the keys {join_words(list(option['properties']), 'and')}"
    match option.get("type"):
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _range(option)
        case "array":
            kinds = {"string": "a list of strings", "integer": "a list of integers"}
            return kinds.get(option["items"].get("type"), "a list of sources")
        case "object":
            values = option["additionalProperties"]
            if not isinstance(values, dict):  # of any type
                return "a mapping such as {enable_thinking: false}"
            number = values.get("type") in ("integer", "number")
            return f"a mapping such as {'{down_proj: 32}' if number else '{prompt: question}'}"
        case _:
            return "a string"


def _range(option: JsonSchema) -> str:
    if "minimum" in option and "maximum" in option:
        return f" from {option['minimum']:g} to {option['maximum']:.10g}"
    bounds = [
        f"{word} {option[name]:g}" if isinstance(option[name], float) else f"{word} {option[name]}"
        for name, word in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in option
    ]
    return f" {join_words(bounds, 'and')}" if bounds else ""


def _choices(option: JsonSchema) -> list[Any]:
    if option.get("type") == "boolean":
        return ["true", "false"]
    return [option["const"]] if "const" in option else list(option.get("enum", ()))


def _nulls(accepted: list[JsonSchema]) -> list[JsonSchema]:
    return [option for option in accepted if option.get("type") == "null"]
