"""Convert a config: the recipe that it stands for, and the lines that account for each of its keys. No torch."""

from dataclasses import replace
from typing import NamedTuple

from lora_cli.convert.config import Config
from lora_cli.convert.draft import NEEDS_ACCEPTANCE, Draft, Line, Outcome
from lora_cli.convert.recipe_text import recipe_text
from lora_cli.convert.tools import TOOLS
from lora_cli.convert.torchtune import resolve


class Conversion(NamedTuple):
    """The result of a conversion."""

    draft: Draft
    lines: list[Line]  # in the order of the config
    text: str  # of the recipe

    def of(self, *outcomes: Outcome) -> list[Line]:
        """Return the lines with one of the outcomes."""
        return [line for line in self.lines if line.outcome in outcomes]

    def to_accept(self) -> list[str]:
        """Return the keys that the user has to accept before the recipe is written."""
        return [line.key for line in self.of(*NEEDS_ACCEPTANCE)]


def convert_config(config: Config, tool: str) -> Conversion:
    """Return the recipe that `config` of the tool named `tool` stands for, and what became of each key.

    Raises:
        LoraError: a value cannot be read.
    """
    entry = TOOLS[tool]
    if tool == "torchtune":
        config = replace(config, values=resolve(config.values))
    draft = Draft(entry.name, config)
    entry.convert(draft)
    if "model.path" not in draft.values:
        draft.set("model.path", "base-model", "replace: the config names no base")
    draft.finish(set(entry.known))
    return Conversion(draft, draft.in_order(), recipe_text(draft))
