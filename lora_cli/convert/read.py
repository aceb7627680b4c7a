"""Read a file that another tool trains from: YAML, JSON, a script, or a shell command. Nothing is run. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_cli.convert.command_line import ReadConfig, read_command_line
from lora_cli.convert.config import Config, Unreadable, show
from lora_cli.convert.notebook import read_notebook
from lora_cli.convert.python_script import read_script
from lora_cli.errors import LoraError
from lora_cli.recipe.problem import Location, UnreadableRecipe
from lora_cli.recipe.yaml_tree import Node, parse_yaml
from lora_cli.run.read_file import read_text

MAX_BYTES = 1024 * 1024
PASS_A_CONFIG = "pass the config, script or command that the other tool trains from"


def read_config(file: Path) -> Config:
    """Return the keys of a config, script or command.

    Raises:
        LoraError: it cannot be read, or has no keys.
    """
    text = _text(file)
    match file.suffix.lower():
        case ".py":
            return read_script(file, text)
        case ".sh" | ".bash" | ".txt" | ".sbatch" | ".slurm":
            return read_command_line(file, text, ReadConfig(lambda config: _read_yaml(config, _text(config))))
        case ".ipynb":
            return read_notebook(file, text, hint=PASS_A_CONFIG, read=_read_named)
    return _read_yaml(file, text)


def _text(file: Path) -> str:
    return read_text(file, limit=MAX_BYTES, hint=PASS_A_CONFIG)


def _read_named(file: Path, text: str | None) -> Config:
    """Read a config that a notebook names: its text, if a cell writes it, else the file."""
    return _read_yaml(file, _text(file) if text is None else text)


def _read_yaml(file: Path, text: str) -> Config:
    try:
        tree, problems = parse_yaml(text, lambda line: Location(line, f"{file}:{line}"), foreign=True)
    except UnreadableRecipe as error:
        raise LoraError(error.problem.line(), hint=PASS_A_CONFIG) from None
    if problems:
        raise LoraError(
            f"{file} cannot be read", hint="correct it first", details=[problem.line() for problem in problems]
        )
    if tree is None or not isinstance(tree.value, dict):
        raise LoraError(f"{file} has no keys", hint=PASS_A_CONFIG)
    values = _plain(tree)
    assert isinstance(values, dict), "its value is a dict"
    named = {event.anchor for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, yaml.AliasEvent)}
    places: dict[str, str] = {}
    anchors: dict[str, str] = {}
    for key, node in _walk(tree, ""):
        places[key] = node.location.text
        if node.anchor in named:
            anchors[key] = f"*{node.anchor}"
    return Config(file, values, places=places, anchors=anchors)


def _plain(node: Node) -> Any:
    """Return the value of a node; what has a tag of an application, which alone knows its value, is not read."""
    if node.tag:
        text = node.source if not isinstance(node.value, list | dict) else show(node.plain())
        return Unreadable(f"{node.tag} {text}".strip())
    match node.value:
        case dict(entries):
            return {key: _plain(inner) for key, inner in entries.items()}
        case list(items):
            return [_plain(inner) for inner in items]
        case value:
            return value


def _walk(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    """Yield each value with its dotted key."""
    if key:
        yield key, node
    if isinstance(node.value, dict):
        for name, inner in node.value.items():
            yield from _walk(inner, f"{key}.{name}" if key else name)
    elif isinstance(node.value, list):
        for index, inner in enumerate(node.value):
            yield from _walk(inner, f"{key}[{index}]")
