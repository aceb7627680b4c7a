"""Read the command that fine-tunes from a shell script: its options, and the config that it names. Nothing is run."""

import ast
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_cli.convert.config import MAX_DEPTH, Config, Replaced, Unreadable, as_number, is_deep, leaves_of, unused_key
from lora_cli.convert.shell_words import Command, commands
from lora_cli.errors import LoraError
from lora_cli.recipe.problem import shorten

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
# The start of a command that trains, as far as it is not a script.
TRAINS = re.compile(
    r"(^|[\s/])(llamafactory-cli train|mlx_lm(\.| )lora|litgpt finetune\w*|tune run|axolotl train|trl [a-z]+)\b"
    r"|-m (axolotl\.cli\.train|mlx_lm\S*lora|trl\.scripts\.\w+|llamafactory\S*)|(train|sft|tune|run_)\w*\.py\b"
)
SUBCOMMANDS = ("llamafactory-cli", "axolotl", "trl", "tune", "litgpt", "mlx_lm")  # programs with a further word
# Tasks in the name of a script or subcommand: `trl dpo`, `examples/scripts/run_grpo.py`, `tune run lora_dpo_...`.
OTHER_TASKS = {
    *("dpo", "grpo", "kto", "orpo", "cpo", "simpo", "reward", "rloo", "ppo"),
    *("gkd", "bco", "xpo", "prm", "nash", "rlhf", "distillation"),
}
OPTION = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
OVERRIDE = re.compile(r"(~|\+{0,2})([A-Za-z_][\w.\[\]-]*)=(.*)", re.DOTALL)  # key=value of torchtune and LLaMA-Factory
REST = ("$@", "$*", "${@}", "${*}")  # all arguments of the script
MAX_OPTIONS = 5_000  # far above any command's: each is compared with the keys of the tool
MAX_COMMANDS = 1_000  # with options, in one script
CONFIG_OPTIONS = ("config", "c")
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


class ReadConfig(NamedTuple):
    """How a config that a command names is read."""

    file: Callable[[Path], Config]
    written: Callable[[Path], Config | None] = lambda _: None  # one that a cell of a notebook writes; None if none does


def training_commands(file: Path, text: str, variables: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the commands of a shell script that train, by name: their words, and where they are."""
    found: dict[str, tuple[str, str]] = {}
    for command in commands(file, text, variables):
        options = _Options(command)
        if options.trains and options.has_options:
            name = unused_key(f"line {command.line}", found)
            found[name] = (" ".join(command.words), f"{file}:{command.line}")
    return found


def read_command_line(
    file: Path, text: str, read: ReadConfig, variables: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """Return the options of the command in `text` that trains, and below them the keys of its config.

    Args:
        file: of the text.
        text: a shell script, or one command.
        read: reads the config that a command names.
        variables: that are assigned before.

    Raises:
        LoraError: no command has options, or one has too many.
    """
    read_commands = [_Options(command) for command in commands(file, text, variables)]
    found = [each for each in read_commands if each.has_options]
    if len(found) > MAX_COMMANDS:
        raise LoraError(f"{file}: {len(found):,} commands with options", hint="pass the training command")
    training = [each for each in found if each.trains] or found
    if not training:
        raise LoraError(
            f"{file}: no command in it has options (--learning_rate 1e-4)",
            hint="pass a config, or the training command",
        )
    config = training[0].config(file, read)
    if (count := sum(1 for _ in config.leaves())) > MAX_OPTIONS:
        raise LoraError(
            f"{file}:{training[0].command.line}: a command with {count:,} options",
            hint="pass the training command",
        )
    further: dict[str, dict[str, Any]] = {}
    for each in found:
        if each is not training[0]:
            kind = "further runs" if each.trains else "other commands"
            section = further.setdefault(kind, {})
            section[unused_key(f"line {each.command.line}", section)] = Unreadable(" ".join(each.command.words))
    places = {f"{kind}.{name}": f"{file}:{name.split()[1]}" for kind, names in further.items() for name in names}
    return Config(
        file,
        {**config.values, **further},
        kind="command line",
        places={**config.places, **places},
        program=config.program,
        replaced=config.replaced,
    )


@dataclass
class _Options:
    """The words of a command by what they are."""

    command: Command
    values: dict[str, Any] = field(default_factory=dict)
    launcher: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)  # words that are no values of options
    replaced: list[Replaced] = field(default_factory=list)  # values of options that are given again

    def __post_init__(self) -> None:
        words = self.command.words
        self.start = _start(words)
        is_module = self.start > 1 and words[self.start - 2] == "-m"
        before = words[: max(0, self.start - 1 - is_module)]
        if any(OPTION.fullmatch(word) for word in before):
            self._read(before, self.launcher)
        own, dashes, launched = _partition(words[self.start :], "--")
        self.arguments = self._read(own, self.values)
        if dashes:
            self.arguments += self._read(launched, self.launcher)
        if words[:2] == ["tune", "run"]:
            self._take_recipe()
        self.launcher |= self.command.environment

    @property
    def has_options(self) -> bool:
        """Whether the command has options, overrides or a config."""
        config = any(word.endswith(CONFIG_SUFFIXES) for word in self.arguments)
        return len(self.values) > 1 or (self.trains and (config or bool(self.values)))

    @property
    def trains(self) -> bool:
        """Whether it is known to train, by its name."""
        return TRAINS.search(self.program) is not None

    @property
    def program(self) -> str:
        """The words before the options."""
        return " ".join(self.command.words[: max(1, self.start)])

    def config(self, file: Path, read: ReadConfig) -> Config:
        """Return the options as a config, with the keys of the config that the command names."""
        words = self.command.words
        program = next((tool for pattern, tool in PROGRAMS if re.search(pattern, " ".join(words))), "")
        place = f"{file}:{self.command.line}"
        values, replaced = self.values, list(self.replaced)
        places: dict[str, str] = {}
        task = _other_task(words, self.start)
        if (named := self._config_name()) is not None and not task:
            below, inner = _find(file, named), read.written(Path(named))
            if below is None and inner is None:
                hint = "convert in the folder where the command trains; `tune cp` writes a config of torchtune's own"
                raise LoraError(f"{place}: {shorten(named)}, which the command names, is not here", hint=hint)
            if inner is None:
                assert below is not None
                inner = read.file(below)
            given = Config(file, values)
            replaced += [
                Replaced(f"{Path(named).name}: {key}", value, inner.place(key), "the command has another value")
                for key, value in inner.leaves()
                if given.is_written(key) and given.raw(key) != value
            ]
            places.update(inner.places)
            values = _merged(inner.values, values)
        if self.launcher:
            own = {"launcher": values["launcher"]} if "launcher" in values else {}
            values["launcher"] = {**self.launcher, **own}
        if self.arguments:
            values["arguments"] = self.arguments
        if task:
            values = {"trainer": task, **values}
        written = {key: place for key, _ in leaves_of(self.values)} | dict.fromkeys(self.values, place)
        return Config(
            file, values, kind="command line", places={**places, **written}, program=program, replaced=replaced
        )

    def _config_name(self) -> str | None:
        """Take the name of a config from the options, or from the words beside them."""
        for key in CONFIG_OPTIONS:
            if isinstance(self.values.get(key), str):
                return str(self.values.pop(key))
        for word in self.arguments:
            if word.endswith(CONFIG_SUFFIXES) and not isinstance(word, Unreadable):
                self.arguments.remove(word)
                return word
        return None

    def _take_recipe(self) -> None:
        """`tune run --nproc_per_node 2 RECIPE --config ...`: the options before the recipe are the launcher's."""
        words = self.command.words[2:]
        index = 0
        while index < len(words) and words[index].startswith("--"):
            index += 1 if "=" in words[index] else 2
        self.values, self.launcher, self.replaced = {}, {}, []
        self._read(words[:index], self.launcher)
        self.arguments = self._read(words[index + 1 :], self.values)

    def _read(self, words: list[str], values: dict[str, Any]) -> list[str]:
        """Add the options among `words` to `values`, and return the words that belong to none."""
        others: list[str] = []
        key = ""
        filled = False  # whether the option has a value already
        for word in words:
            override = OVERRIDE.fullmatch(word)
            if word in REST:
                others.append(word)
            elif OPTION.fullmatch(word) and as_number(word) is None and not isinstance(word, Unreadable):
                name, equals, value = word.lstrip("-").partition("=")
                key, filled = name.replace("-", "_"), bool(equals)
                self._add(values, key, _value(value) if equals else True)
                key = "" if equals else key
            elif override and (filled or not key):
                key = ""
                self._add(values, override[2], _value(override[3]))
            elif key:
                value = _value(word)
                before = _get(values, key)
                if filled and isinstance(before, list):
                    before.append(value)
                else:
                    _set(values, key, [before, value] if filled else value)
                filled = True
            else:
                others.append(word)
        return others

    def _add(self, values: dict[str, Any], key: str, value: Any) -> None:
        before = _get(values, key)
        if before is not None and before != value:
            self.replaced.append(Replaced(f"{key}, given before", before, "", "the option is given again"))
        _set(values, key, value)


def _start(words: list[str]) -> int:
    """Return where the options of the script, module or subcommand start: those before it are of the launcher.

    `accelerate launch --num_processes 4 train.py --learning_rate 1e-4`
    """
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    modules = [index for index in range(1, len(words)) if words[index - 1] == "-m"]
    if scripts or modules:
        return min([*scripts, *modules]) + 1
    for index, word in enumerate(words[:-1]):
        if word.rpartition("/")[2] in SUBCOMMANDS and not words[index + 1].startswith("-"):
            return index + 2
    return 1


def _other_task(words: list[str], start: int) -> str:
    """Return the script, or the program with its subcommand, if it is named after another task; else nothing."""
    name = words[start - 1].rpartition("/")[2]
    named = [name] if name.endswith(".py") or "-m" in words else []
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


def _find(file: Path, name: str) -> Path | None:
    """Return a config that a command names: in this folder, or beside the script."""
    places = (Path(name), file.parent / name)
    return next((place for place in places if place.suffix in CONFIG_SUFFIXES and os.path.isfile(place)), None)


def _partition(words: list[str], separator: str) -> tuple[list[str], bool, list[str]]:
    if separator not in words:
        return words, False, []
    at = words.index(separator)
    return words[:at], True, words[at + 1 :]


def _value(text: str) -> Any:
    if isinstance(text, Unreadable):
        return text
    if text[:1] in ("{", "["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
            return text if is_deep(value) else value
        if text[0] == "[" and text.endswith("]"):
            return [_scalar(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return _scalar(text)


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null"):
        return None
    number = as_number(text)
    return text if number is None else number


def _get(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split(".", MAX_DEPTH):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".", MAX_DEPTH)
    for part in sections:
        inner = values.get(part)
        if not isinstance(inner, dict):  # `--data JSON --data.json_path x`: the class, and its arguments
            inner = {} if inner is None else {"class_path": inner}
        values[part] = inner
        values = inner
    if isinstance(values.get(last), dict) and not isinstance(value, dict):
        values[last]["class_path"] = value
    else:
        values[last] = value


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config with those that a command changes."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result
