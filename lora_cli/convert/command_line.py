"""Read a shell script or a command line that fine-tunes: the options of its first command with some. Nothing is run."""

import re
import shlex
from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config, as_number
from lora_cli.errors import LoraError

ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
# Programs, and the tool that each belongs to.
PROGRAMS = (
    (r"llamafactory-cli|llamafactory|src/train(_bash)?\.py", "llama-factory"),
    (r"mlx_lm", "mlx"),
    (r"\blitgpt\b", "litgpt"),
    (r"\btune run\b", "torchtune"),
    (r"\baxolotl\b", "axolotl"),
    (r"unsloth", "unsloth"),
    (r"\btrl\b|sft\.py|run_sft|train\.py", "trl"),
)


def read_command_line(file: Path, text: str) -> Config:
    """Return the options of the first command in `text` that has some.

    Raises:
        LoraError: no command has options.
    """
    variables: dict[str, str] = {}
    joined = re.sub(r"\\\r?\n", " ", text)
    for number, line in enumerate(joined.splitlines(), start=1):
        if line.lstrip().startswith("#"):
            continue
        if match := ASSIGNMENT.match(line):
            value = VARIABLE.sub(lambda found: variables.get(found[1], found[0]), match[2])
            variables[match[1]] = " ".join(_split(value))
            continue
        words = _split(VARIABLE.sub(lambda found: variables.get(found[1], found[0]), line))
        # `accelerate launch --num_processes 4 train.py --learning_rate 1e-4`: the launcher's own options come first.
        script = next((index for index, word in enumerate(words) if word.endswith(".py")), 0)
        values = _options(words[script:])
        if launcher := _options(words[:script]):
            values["launcher"] = launcher
        if len(values) >= 2:
            program = next((tool for pattern, tool in PROGRAMS if re.search(pattern, line)), "")
            places = dict.fromkeys(values, f"{file}:{number}")
            return Config(file, values, kind="command line", places=places, program=program)
    raise LoraError(
        f"{file}: no command in it has options (--learning_rate 1e-4)", hint="pass a config, or the training command"
    )


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that is not closed
        return line.split()


def _options(words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    key = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word) and as_number(word) is None:
            name, equals, value = word.lstrip("-").partition("=")
            key = "" if equals else _key(name)
            _set(values, _key(name), _value(value) if equals else True)
        elif key:
            before = _get(values, key)
            value = _value(word)
            _set(values, key, value if before is True else [*(before if isinstance(before, list) else [before]), value])
    return values


def _key(name: str) -> str:
    return name.replace("-", "_")


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null"):
        return None
    number = as_number(text)
    return text if number is None else number


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for part in sections:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value
