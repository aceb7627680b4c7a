"""Configs that other tools publish, as keys and values, and which of their keys a user has to accept.

From the examples of axolotl, LLaMA-Factory, torchtune, litgpt and mlx-lm, TRL's and PEFT's example commands, the
alignment handbook, unsloth's notebooks, and configs that people published for mlx-lm.
"""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "inputs" / "other_tools"


class Example(NamedTuple):
    """A published config."""

    file: Path
    tool: str
    accepted: tuple[str, ...]
    other_task: bool

    @property
    def name(self) -> str:
        return f"{self.tool}/{self.file.stem}"


# Examples that are not supervised fine-tuning of an adapter.
OTHER_TASKS = {
    "axolotl/llama-3-instruct-dpo-lora-8b",
    "llama-factory/llama3-dpo",
    "llama-factory/llama3-kto",
    "trl/example-config",
    "trl/starchat2-15b-full",
}
# Keys that change what is learnt and are not offered. Without them, nothing is written.
ACCEPTED: dict[str, tuple[str, ...]] = {}


def examples() -> list[Example]:
    """Return every published config."""
    files = sorted(
        file for tool in FOLDER.iterdir() if tool.name != "data" for file in tool.iterdir() if file.is_file()
    )
    found = []
    for file in files:
        name = f"{file.parent.name}/{file.stem}"
        found.append(Example(file, file.parent.name, ACCEPTED.get(name, ()), name in OTHER_TASKS))
    return found
