"""Read a file that another tool trains from: YAML, JSON, a script, or a shell command. Nothing is run. No torch."""

import json
from pathlib import Path
from typing import Any

from lora_cli.convert.command_line import read_command_line
from lora_cli.convert.config import Config
from lora_cli.convert.python_script import read_script
from lora_cli.errors import LoraError
from lora_cli.recipe.problem import Location, UnreadableRecipe
from lora_cli.recipe.yaml_tree import Node, parse_yaml
from lora_cli.run.read_file import read_text

MAX_BYTES = 1024 * 1024
PASS_A_CONFIG = "pass the config, script or command that the other tool trains from"
# What another tool may have in YAML, and a recipe may not.
HARMLESS = ("a key that is not a string", "is not supported")


def read_config(file: Path) -> Config:
    """Return the keys of a config, script or command.

    Raises:
        LoraError: it cannot be read, or has no keys.
    """
    text = read_text(file, limit=MAX_BYTES, hint=PASS_A_CONFIG)
    match file.suffix.lower():
        case ".py":
            return read_script(file, text)
        case ".sh" | ".bash" | ".txt" | ".sbatch" | ".slurm":
            return read_command_line(file, text)
        case ".ipynb":
            return read_script(file, _cells(file, text))
    return _read_yaml(file, text)


def _cells(file: Path, text: str) -> str:
    """Return the code of a notebook; lines for the shell and magics are left out."""
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        raise LoraError(f"{file}: is not a notebook that can be read", hint=PASS_A_CONFIG) from None
    lines = "\n".join(sources).splitlines()
    return "\n".join(
        "pass" if line.lstrip().startswith(("!", "%")) and line == line.lstrip() else line for line in lines
    )


def _read_yaml(file: Path, text: str) -> Config:
    try:
        tree, problems = parse_yaml(text, lambda line: Location(line, f"{file}:{line}"), merge=True)
    except UnreadableRecipe as error:
        raise LoraError(error.problem.line(), hint=PASS_A_CONFIG) from None
    serious = [problem for problem in problems if not any(each in problem.message for each in HARMLESS)]
    if serious:
        raise LoraError(
            f"{file} cannot be read", hint="correct it first", details=[problem.line() for problem in serious]
        )
    if tree is None or not isinstance(tree.value, dict):
        raise LoraError(f"{file} has no keys", hint=PASS_A_CONFIG)
    values = tree.plain()
    assert isinstance(values, dict), "its value is a dict"
    places: dict[str, str] = {}
    _add_places(tree, "", places)
    return Config(file, values, places=places)


def _add_places(node: Node, key: str, places: dict[str, str]) -> None:
    value: Any = node.value
    if key:
        places[key] = node.location.text
    if isinstance(value, dict):
        for name, inner in value.items():
            _add_places(inner, f"{key}.{name}" if key else name, places)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _add_places(inner, f"{key}[{index}]", places)
