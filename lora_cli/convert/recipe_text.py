"""Write a drafted recipe as YAML: sections in the order of the schema, and with each value the key that it is from."""

from functools import cache
from typing import Any

from lora_cli.convert.draft import Draft
from lora_cli.errors import one_line
from lora_cli.recipe.dump import dump_value
from lora_cli.recipe.schema import Recipe

WIDTH = 40  # column of the comments


def recipe_text(draft: Draft) -> str:
    """Return the YAML of the draft's recipe, with comments."""
    lines = [f"# From {one_line(draft.config.file.name)}, a {draft.config.kind} of {draft.tool}, by `lora convert`."]
    for section, field in Recipe.model_fields.items():
        name = field.alias or section
        inner = {key.partition(".")[2]: value for key, value in draft.values.items() if key.startswith(f"{name}.")}
        if inner:
            lines.append(f"{name}:")
            order = _order(name)
            for key in sorted(inner, key=lambda key: order.index(key) if key in order else len(order)):
                lines += _entry(f"{name}.{key}", key, inner[key], draft.comments, indent=2)
        elif name in draft.values:
            lines += _entry(name, name, draft.values[name], draft.comments, indent=0)
    return "\n".join(lines) + "\n"


@cache
def _order(section: str) -> list[str]:
    schema = Recipe.model_json_schema()
    field = schema["properties"][section]
    options = [*field.get("anyOf", ()), *field.get("allOf", ()), field]
    name = next((option["$ref"].rpartition("/")[2] for option in options if "$ref" in option), "")
    return list(schema["$defs"].get(name, {}).get("properties", ()))


def _entry(dotted: str, key: str, value: Any, comments: dict[str, str], *, indent: int) -> list[str]:
    spaces = " " * indent
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        lines = [_with_comment(f"{spaces}{key}:", comments.get(dotted, ""))]
        for index, item in enumerate(value):
            comment = comments.get(f"{dotted}[{index}]", "")
            for number, (name, inner) in enumerate(item.items()):
                start = f"{spaces}  - " if number == 0 else f"{spaces}    "
                lines.append(_with_comment(f"{start}{name}: {dump_value(inner)}", "" if number else comment))
        return lines
    return [_with_comment(f"{spaces}{key}: {dump_value(value)}", comments.get(dotted, ""))]


def _with_comment(line: str, comment: str) -> str:
    comment = one_line(" ".join(comment.split()))
    return f"{line:<{WIDTH}}  # {comment}" if comment else line
