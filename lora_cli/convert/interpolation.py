"""Values that a config writes as text: references to other keys (`${output_dir}`), and sections as JSON. No torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_cli.convert.config import Config, Unreadable, leaves_of

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
UNKNOWN = re.compile(r"\$\{[\w.]+(:[^{}]*)?\}")  # ${oc.env:HOME}
WITH_REFERENCES = ("torchtune", "llama-factory")  # tools that read their configs with OmegaConf


def with_plain_values(config: Config, tool: str) -> Config:
    """Return a config with references replaced by their values, and sections that are JSON texts as sections.

    Args:
        config: as read.
        tool: as in --from.
    """
    values = {key: _section(value) for key, value in config.values.items()}
    if tool not in WITH_REFERENCES:
        return replace(config, values=values)
    texts = [value for _, value in leaves_of(values) if isinstance(value, str)]
    named = {name: f"${{{name}}}" for text in texts for name in REFERENCE.findall(text)}
    return replace(config, values=resolve(values), anchors={**config.anchors, **named})


def _section(value: Any) -> Any:
    """transformers takes JSON texts for dictionaries: `lr_scheduler_kwargs: '{"min_lr": 1e-5}'`."""
    if not isinstance(value, str) or isinstance(value, Unreadable) or not value.lstrip().startswith("{"):
        return value
    try:
        section = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return section if isinstance(section, dict) else value


def resolve(values: Any, top: Any = None) -> Any:
    """Return the values with `${output_dir}` replaced by what it refers to; unknown if it refers to nothing here."""
    top = values if top is None else top
    if isinstance(values, Mapping):
        return {key: resolve(value, top) for key, value in values.items()}
    if isinstance(values, list):
        return [resolve(value, top) for value in values]
    if not isinstance(values, str) or isinstance(values, Unreadable):
        return values

    def find(name: str) -> Any:
        found = top
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def put(match: re.Match[str]) -> str:
        found = find(match[1])
        return match[0] if found is None or isinstance(found, Mapping | list) else str(found)

    whole = REFERENCE.fullmatch(values)
    if whole and not isinstance(found := find(whole[1]), str | None | Mapping):
        return found  # a number stays one
    for _ in range(4):  # references to references
        if (changed := REFERENCE.sub(put, values)) == values:
            break
        values = changed
    return Unreadable(values) if UNKNOWN.search(values) else values
