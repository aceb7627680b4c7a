"""Values that a config writes as text: references to other keys (`${output_dir}`), and sections as JSON. No torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config, Unreadable, is_deep, leaves_of
from lora_cli.errors import LoraError
from lora_cli.recipe.problem import shorten

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
UNKNOWN = re.compile(r"\$\{[\w.]+(:[^{}]*)?\}")  # ${oc.env:HOME}
MAX_REFERENCES = 50  # of a chain: a reference to a reference to ...
MAX_WRITTEN = 1 << 20  # characters that references become together
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
    return replace(config, values=resolve(values, config.file), anchors={**config.anchors, **named})


def _section(value: Any) -> Any:
    """transformers takes JSON texts for dictionaries: `lr_scheduler_kwargs: '{"min_lr": 1e-5}'`."""
    if not isinstance(value, str) or isinstance(value, Unreadable) or not value.lstrip().startswith("{"):
        return value
    try:
        section = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return section if isinstance(section, dict) and not is_deep(section) else value


def resolve(values: Any, file: Path) -> Any:
    """Return the values with `${output_dir}` replaced by what it refers to; unknown if it refers to nothing here.

    Raises:
        LoraError: the references of `file` refer to each other without end, or become too long a text.
    """
    return _Resolver(values, file).resolve(values)


class _Resolver:
    def __init__(self, top: Any, file: Path) -> None:
        self._top, self._file = top, file
        self._written = 0  # characters that references became

    def resolve(self, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {key: self.resolve(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.resolve(value) for value in values]
        if not isinstance(values, str) or isinstance(values, Unreadable):
            return values
        text = values
        for _ in range(MAX_REFERENCES):
            whole = REFERENCE.fullmatch(text)
            if whole and not isinstance(found := self._find(whole[1]), str | None | Mapping):
                return found  # a number stays one
            if (changed := REFERENCE.sub(self._put, text)) == text:
                return Unreadable(text) if UNKNOWN.search(text) else text
            text = changed
        raise self._error(f"references refer to each other: {shorten(values)}")

    def _find(self, name: str) -> Any:
        found = self._top
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def _put(self, match: re.Match[str]) -> str:
        found = self._find(match[1])
        text = match[0] if found is None or isinstance(found, Mapping | list) else str(found)
        self._written += len(text)
        if self._written > MAX_WRITTEN:
            raise self._error(f"references become more than {MAX_WRITTEN:,} characters, and are not read further")
        return text

    def _error(self, problem: str) -> LoraError:
        return LoraError(f"{self._file}: {problem}", hint="write the values in place of ${NAME}")
