"""The words of `lora` commands in shell text, and whether the command line knows their subcommands and options."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer

from lora_cli import cli

CALL = re.compile(r"(?:^|[\s;&|(\"'])(?:(?:[\w.]+/)*lora|-m\s+lora_cli)\s+(?P<words>[^|;&)#\n]*)")


def lora_calls(text: str) -> Iterator[list[str]]:
    """Yield the words after `lora` or `-m lora_cli` of each call in shell text, without comments."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        for call in CALL.finditer(re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(call["words"].split(" > ")[0].replace("...", " "))
            if words:
                yield words


def unknown_words(words: list[str]) -> list[str]:
    """Return the subcommands and options that the command line does not have."""
    command: Any = typer.main.get_command(cli.app)
    known = {"--help"}
    for place, word in enumerate(words):
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        if not hasattr(command, "commands"):
            return [one for one in words[place:] if one.startswith("--") and one.split("=")[0] not in known]
        if word.startswith("-"):
            if word not in known:
                return [word]
        elif word == "COMMAND":  # any of them
            return []
        elif word not in command.commands:
            return [word]
        else:
            command = command.commands[word]
    return []
