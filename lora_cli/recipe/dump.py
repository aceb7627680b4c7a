"""Write a recipe: the resolved YAML of a run, and the JSON Schema for editors. No torch."""

from collections.abc import Mapping
from math import inf
from typing import Any

import yaml

from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.yaml_scalars import FLOAT

HEADER = "# Resolved recipe: every value of the run, defaults included. `lora train` accepts this file unchanged.\n"


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes strings which our loader, but not YAML 1.1, reads as numbers, such as `1e5`."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes a next-line character (U+0085) into single quotes, and reads it back as a space.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default filled in; `load_recipe` returns an equal recipe for it."""
    return HEADER + dump_values(recipe.model_dump())


def dump_values(recipe: Mapping[str, Any]) -> str:
    """Return the values of a recipe, as in JSON, as YAML that `load_recipe` reads as the same values."""
    return "".join(
        yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=inf)
        for key, value in recipe.items()
    )


def dump_value(value: Any) -> str:
    """Return a value of a recipe as YAML in one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=inf)
    return text.removesuffix("...\n").strip()


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe.

    An editor validates a recipe with it if the first line is `# yaml-language-server: $schema=PATH`.
    """
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lora recipe"}
