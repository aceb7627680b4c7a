"""Make the recipe reference and the command reference from the schema and the command line, as Markdown.

python scripts/make_reference.py recipe      every key with its type, range, default and description
python scripts/make_reference.py commands    every command with its arguments and options

The pages are made when the documentation is built (scripts/docs_hooks.py): a new key or option is in them by itself.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from lora_cli import cli
from lora_cli.recipe.dump import recipe_schema
from lora_cli.recipe.schema import Recipe

Schema = Mapping[str, Any]
RANGES = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
HIDDEN = ("help", "install_completion", "show_completion")  # parameters that typer adds to every command


def recipe_reference() -> str:
    """Return the page of all recipe keys."""
    schema = recipe_schema()
    top = {key: field for key, field in schema["properties"].items() if _section(field) is None}
    sections = {key: name for key, field in schema["properties"].items() if (name := _section(field))}
    shared = [name for name in schema["$defs"] if name not in sections.values()]
    lines = [
        "# Recipe reference",
        "",
        "Every key of a recipe, with its type, range and default. The same text is in `lora schema`, for editors.",
        "",
        "## Top level",
        "",
    ]
    defaults = _defaults(schema)
    for key, field in top.items():
        lines += _key(key, field, schema, default=defaults.get(key))
    for key, name in sections.items():
        required = key in schema["required"]
        lines += [f"## {key}", "", _description(schema["$defs"][name]), ""]
        lines += ["Required." if required else "The section can be left out.", ""]
        lines += _keys(key, schema["$defs"][name], schema, defaults=defaults.get(key) or {})
    for name in shared:
        title = _shared_title(name)
        lines += [f"## {title}", "", _description(schema["$defs"][name]), ""]
        lines += _keys(title, schema["$defs"][name], schema, defaults={})
    return "\n".join(lines)


def command_reference(app: typer.Typer = cli.app) -> str:
    """Return the page of all commands."""
    lines = [
        "# Command reference",
        "",
        "Every command with its arguments and options, as `lora COMMAND --help` prints them.",
        "",
    ]
    for words, command in _commands("lora", typer.main.get_command(app)):
        parameters = [one for one in command.params if one.name not in HIDDEN and not getattr(one, "hidden", False)]
        if hasattr(command, "commands") and not parameters:
            continue
        usage = " ".join(_usage(parameter) for parameter in parameters if not _is_option(parameter))
        lines += [f"## {words}", "", _sentence(command.help or ""), "", "```text"]
        lines += [" ".join(filter(None, (words, usage, "[OPTIONS]" * any(map(_is_option, parameters))))), "```", ""]
        if parameters:
            lines += ["| | value | default | |", "|---|---|---|---|", *map(_parameter_row, parameters), ""]
        if command.epilog:  # examples
            lines += ["```text", *command.epilog.splitlines(), "```", ""]
    return "\n".join(lines)


def _section(field: Schema) -> str | None:
    """Return the name of the section that a key has as its value, or that it may have; None for other keys."""
    parts = [field, *field.get("anyOf", ())]
    return next((part["$ref"].removeprefix("#/$defs/") for part in parts if "$ref" in part), None)


def _defaults(schema: Schema) -> dict[str, Any]:
    """Return the values of a recipe that sets nothing but what is required, with the optional sections present."""
    tree: dict[str, Any] = {}
    for key, field in schema["properties"].items():
        name = _section(field)
        needed = schema["$defs"][name].get("required", []) if name else []
        if key in schema["required"] or (name and not needed):
            tree[key] = dict.fromkeys(needed, "x")
    return Recipe.model_validate(tree).model_dump()


def _keys(path: str, section: Schema, schema: Schema, *, defaults: Mapping[str, Any]) -> Iterator[str]:
    for key, field in section["properties"].items():
        required = key in section.get("required", ())
        yield from _key(f"{path}.{key}", field, schema, required=required, default=defaults.get(key))


def _key(path: str, field: Schema, schema: Schema, *, default: object, required: bool = False) -> list[str]:
    value = default if default is not None else field.get("default")
    told = "required" if required else f"default: `{_yaml(value)}`"
    return [f"### {path}", "", f"{_type(field)}; {told}", "", _description(field), ""]


def _type(field: Schema) -> str:
    """Return the type of a key with its choices and its range, in words."""
    if "anyOf" in field:
        return ", or ".join(_type(part) for part in field["anyOf"])
    if "$ref" in field:
        title = _shared_title(field["$ref"].removeprefix("#/$defs/"))
        return f"[{title}](#{title.lower()})"
    if "enum" in field:
        return " | ".join(f"`{_yaml(choice)}`" for choice in field["enum"])
    if "const" in field:
        return f"`{_yaml(field['const'])}`"
    match field.get("type"):
        case "array":
            return f"list of: {_type(field['items'])}"
        case "object":
            values = field.get("additionalProperties")
            return f"mapping of names to: {_type(values)}" if isinstance(values, dict) and values else "mapping"
        case "boolean":
            return "`true` | `false`"
        case kind:
            limits = [words.format(f"{field[name]:g}") for name, words in RANGES.items() if name in field]
            return " ".join([str(kind or "any value"), " and ".join(limits)]).strip()


def _shared_title(name: str) -> str:
    return name.removesuffix("Spec").lower()


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _description(field: Schema) -> str:
    return _sentence(field.get("description", ""))


def _sentence(text: str) -> str:
    """Return text as one line of Markdown; what stands between < and > is no HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_])", r"\\\1", part) for part in parts)


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it, each with the words that call it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(f"{words} {name}", below)


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _parameter_row(parameter: Any) -> str:
    name = ", ".join(parameter.opts) if _is_option(parameter) else _usage(parameter)
    value = "" if not _is_option(parameter) or parameter.is_flag else _value(parameter)
    notes = _sentence(parameter.help or "")
    notes += " May be repeated." if _is_option(parameter) and parameter.multiple else ""
    cells = [f"`{name}`", value, _default(parameter), notes.replace("|", "&#124;")]
    return f"| {' | '.join(cells)} |"


def _value(option: Any) -> str:
    annotation = option.type_descriptor.annotation
    kind = {int: "integer", float: "number"}.get(annotation, "")
    limits = [
        words.format(f"{limit:g}")
        for words, limit in (("at least {}", option.min), ("at most {}", option.max))
        if limit is not None
    ]
    return ", ".join([f"`{option.metavar or 'TEXT'}`" if option.metavar or not kind else kind, *limits])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or not _is_option(parameter):
        return ""
    return f"`{parameter.default}`"


if __name__ == "__main__":
    pages = {"recipe": recipe_reference, "commands": command_reference}
    if len(sys.argv) != 2 or sys.argv[1] not in pages:
        sys.exit(f"usage: make_reference.py {' | '.join(pages)}")
    sys.stdout.write(pages[sys.argv[1]]() + "\n")
