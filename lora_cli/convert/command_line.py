"""Read a shell script or a command line that fine-tunes: the options of its first command with some. Nothing is run."""

import re
import shlex
from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config, as_number
from lora_cli.errors import LoraError

ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)
COMPUTED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=((?:\(|\$\(|`).*)$")  # NAME=$(command), NAME=(a b)
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
# Tasks in the name of a script or subcommand: `trl dpo`, `examples/scripts/run_grpo.py`, `tune run lora_dpo_...`.
OTHER_TASKS = {
    *("dpo", "grpo", "kto", "orpo", "cpo", "simpo", "reward", "rloo", "ppo"),
    *("gkd", "bco", "xpo", "prm", "nash", "rlhf", "distillation"),
}


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
        replaced = VARIABLE.sub(lambda found: variables.get(found[1], found[0]), line)
        if match := COMPUTED.match(replaced):
            variables[match[1]] = " ".join(_split(match[2]))
            continue
        words, environment = _without_assignments(_split(replaced))
        if not words:
            variables.update(environment)
            continue
        script = _script(words)
        values = _options(words[script:])
        if launcher := _options(words[: max(0, script - (words[script - 1] == "-m"))]):
            values["launcher"] = launcher
        if len(values) >= 2:
            program = next((tool for pattern, tool in PROGRAMS if re.search(pattern, " ".join(words))), "")
            if environment:
                values["launcher"] = {**values.get("launcher", {}), **environment}
            if trainer := _other_task(words, script):
                values = {"trainer": trainer, **values}
            places = dict.fromkeys(values, f"{file}:{number}")
            return Config(file, values, kind="command line", places=places, program=program)
    raise LoraError(
        f"{file}: no command in it has options (--learning_rate 1e-4)", hint="pass a config, or the training command"
    )


def _without_assignments(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return a command without the assignments before it (`CUDA_VISIBLE_DEVICES=0 python train.py`), and those."""
    assigned: dict[str, str] = {}
    for index, word in enumerate(words):
        match = ASSIGNMENT.match(word)
        if match:
            assigned[match[1]] = match[2]
        elif word not in ("export", "env", "&&", ";"):
            return words[index:], assigned
    return [], assigned


def _script(words: list[str]) -> int:
    """Return the index of the script or module that the options belong to.

    `accelerate launch --num_processes 4 train.py --learning_rate 1e-4`: the launcher's own options come first.
    """
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    modules = [index for index in range(1, len(words)) if words[index - 1] == "-m"]
    return next(iter([*scripts, *modules]), 0)


def _other_task(words: list[str], script: int) -> str:
    """Return the script, or the program with its subcommand, if it is named after another task; else nothing."""
    name = words[script].rpartition("/")[2]
    named = [name] if script else []
    for index, word in enumerate(words[:-1]):
        if word.rpartition("/")[2] in ("trl", "litgpt"):
            named.append(f"{word.rpartition('/')[2]} {words[index + 1]}")
        elif word.rpartition("/")[2] == "tune" and words[index + 1] == "run":
            named += [f"tune run {each}" for each in words[index + 2 :] if re.match(r"[a-z]+_\w+$", each)][:1]
    for text in named:
        parts = set(re.split(r"[\W_]+", text.lower()))
        if parts & OTHER_TASKS and "sft" not in parts:
            return text
    return ""


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
