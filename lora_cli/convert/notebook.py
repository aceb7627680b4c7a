"""Read a notebook: its cells as one script, and its lines and cells for the shell as commands. Nothing is run."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli.convert.command_line import ReadConfig, read_command_line, training_commands
from lora_cli.convert.config import Config, Unreadable
from lora_cli.convert.python_script import CONFIGS, USERS, constants_of, read_script
from lora_cli.errors import LoraError

SHELL_CELLS = re.compile(r"%%(?:bash|sh|shell|script\s+(?:ba|z)?sh)\b")
WRITTEN_CELLS = re.compile(r"%%(?:writefile|file)\s+(?P<name>[^-\s]\S*)\s*$")
PYTHON_CELLS = re.compile(r"%%(?:capture|time|timeit|prun)\b")  # which run the cell
SHELL_LINE = re.compile(r"(?P<indent>\s*)(?:(?P<target>[A-Za-z_]\w*)\s*=\s*)?!{1,2}(?P<command>[^=!].*)")
RUN_LINE = re.compile(r"(?P<indent>)(?P<target>)%(?:sx|system)\s+(?P<command>.+)")
EXPRESSION = re.compile(r"\{\{|\}\}|\{(?P<text>[^{}\"':]+)\}")  # what IPython replaces in a line
TRAINING_CALLS = {*USERS, *CONFIGS} - {"BitsAndBytesConfig"}  # of those that are read; the others only load a model
UNREAD = "unread cells"  # key of the report


@dataclass
class _Cells:
    """The lines of a notebook, in the lines of its code: each is in one of the two, and empty in the other."""

    python: list[str] = field(default_factory=list)
    shell: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # that cells write, by their names
    unread: list[str] = field(default_factory=list)  # of other languages and magics

    def add(self, *, python: str = "", shell: str = "") -> None:
        self.python.append(python)
        self.shell.append(shell)


def read_notebook(file: Path, text: str, *, hint: str, read: Callable[[Path, str | None], Config]) -> Config:
    """Return the arguments of the calls of a notebook, or the options of the command in it that trains.

    Args:
        file: of the notebook.
        text: its JSON.
        hint: for what is no notebook.
        read: reads a config that a command names, from the text that a cell writes, if there is one.

    Raises:
        LoraError: it is no notebook, or nothing in it trains.
    """
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LoraError(f"{file}: is not a notebook that can be read", hint=hint) from None
    parts = _Cells()
    for source in sources:
        _add_cell(parts, source)
    python, shell = "\n".join(parts.python), "\n".join(parts.shell)
    variables = {
        name: str(value) for name, value in constants_of(python).items() if isinstance(value, str | int | float)
    }
    commands = training_commands(file, shell, variables)
    config = _read_python(file, python, needed=not commands)
    if config is None or (commands and not config.values.keys() & TRAINING_CALLS):
        config = read_command_line(file, shell, _reader(parts.files, read), variables)
        others = any(line.strip() not in ("", "pass") for line in parts.python)
        parts.unread += ["the Python of the other cells"] * others
    elif commands:
        config = _with_runs(config, commands)
    starts = {place.rpartition(":")[2] for _, place in commands.values()}
    parts.unread += [line for number, line in _first_lines(parts.shell) if str(number) not in starts]
    if not parts.unread:
        return config
    return replace(config, values={**config.values, UNREAD: Unreadable("; ".join(parts.unread))})


def _read_python(file: Path, text: str, *, needed: bool) -> Config | None:
    """Return the arguments of the calls of a script; None for one without them, unless it is `needed`."""
    try:
        return read_script(file, text)
    except LoraError:
        if needed:
            raise
        return None


def _first_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that has one, without those that it goes on in."""
    before = ""
    for number, line in enumerate(lines, start=1):
        if line.strip() and not before.endswith("\\"):
            yield number, line.strip()
        before = line


def _add_cell(parts: _Cells, source: str) -> None:
    lines = source.split("\n")
    first = lines[0].strip()
    written = WRITTEN_CELLS.match(first)
    if SHELL_CELLS.match(first):
        parts.add()
        for line in lines[1:]:
            parts.add(shell=line)
    elif written:
        parts.files[written["name"].strip("\"'")] = "\n".join(lines[1:]) + "\n"
        parts.add()
        for _ in lines[1:]:
            parts.add()
    elif first.startswith("%%") and not PYTHON_CELLS.match(first):
        parts.unread.append(first)
        for _ in lines:
            parts.add()
    else:
        _add_lines(parts, lines)


def _add_lines(parts: _Cells, lines: list[str]) -> None:
    """Add the lines of a cell of Python; a line for the shell goes on after a backslash."""
    continued = False
    for line in lines:
        found = SHELL_LINE.fullmatch(line) or RUN_LINE.fullmatch(line)
        if continued:
            parts.add(shell=_without_braces(line))
            continued = line.endswith("\\")
        elif found:
            target = f"{found['target']} = output_of_the_shell" if found["target"] else "pass"
            parts.add(python=f"{found['indent']}{target}", shell=_without_braces(found["command"]))
            continued = line.endswith("\\")
        elif line.startswith("%"):
            if not line.startswith("%%"):
                parts.unread.append(line)
            parts.add(python="pass")
        else:
            parts.add(python=line)


def _without_braces(line: str) -> str:
    """Return a line for the shell with `{name}`, a value of the notebook, as `${name}`; an expression is not known."""

    def put(match: re.Match[str]) -> str:
        if match["text"] is None:
            return match[0][0]
        return f"${{{match['text']}}}" if match["text"].isidentifier() else f"$({match['text']})"

    return EXPRESSION.sub(put, line)


def _reader(files: Mapping[str, str], read: Callable[[Path, str | None], Config]) -> ReadConfig:
    names = {Path(name): text for name, text in files.items()}

    def find(path: Path) -> Config | None:
        return read(path, names[path]) if path in names else None

    return ReadConfig(lambda path: read(path, None), find)


def _with_runs(config: Config, commands: Mapping[str, tuple[str, str]]) -> Config:
    """Return the config of the calls, with a key for each command that trains, too."""
    values: dict[str, Any] = {
        **config.values,
        "further runs": {name: Unreadable(text) for name, (text, _) in commands.items()},
    }
    places = {f"further runs.{name}": place for name, (_, place) in commands.items()}
    return replace(config, values=values, places={**config.places, **places})
