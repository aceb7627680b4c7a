"""A recipe as commented YAML, in the style of configs/: a line for each value, with its reason. No torch."""

from collections.abc import Mapping
from typing import Any

import yaml

from lora_cli.errors import one_line

SECTIONS = ("model", "quantization", "adapter", "data", "training")
COMMENT_COLUMN = 26  # at which short lines have their comment


def render_recipe(title: str, values: Mapping[str, tuple[Any, str]]) -> str:
    """Return the text of a recipe.

    Args:
        title: of the first line.
        values: value and reason by key with dots, such as `data.max_length`; keys without a dot are at the top level.
    """
    lines = [f"# {one_line(title)}"]
    for section in SECTIONS:
        inside = {key.partition(".")[2]: each for key, each in values.items() if key.startswith(f"{section}.")}
        if not inside:
            continue
        lines += [*([""] if section != "model" else []), f"{section}:"]
        lines += [_line(f"  {name}", value, why) for name, (value, why) in inside.items()]
        if section == "model" and "task" in values:
            lines.append(_line("task", *values["task"]))
    rest = {key: each for key, each in values.items() if "." not in key and key != "task"}
    lines += [line for key, (value, why) in rest.items() for line in ("", _line(key, value, why))]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, why: str) -> str:
    text = f"{key}: {format_value(value)}"
    return f"{text:<{COMMENT_COLUMN - 2}}  # {one_line(why)}"


def format_value(value: Any) -> str:
    """Return a value in one line of YAML."""
    if isinstance(value, float) and 0 < value < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
