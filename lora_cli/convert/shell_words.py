"""Split a shell script into its commands, with variables replaced where the script assigns them. Nothing is run."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lora_cli.convert.config import Unreadable
from lora_cli.errors import LoraError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
ARRAY = re.compile(r"^\s*(?:declare\s+-a\s+|local\s+|export\s+)?(\w+)(\+?)=\(([^()]*)\)\s*$", re.MULTILINE)
ITEMS = re.compile(r'"?\$\{(\w+)\[[@*]\]\}"?')
# $NAME, ${NAME}, ${NAME:-default}
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?[-=]([^{}]*))?\})")
# What only running the script would tell: $((1 + 1)), $(command), `command`.
COMPUTED = re.compile(r"\$\(\([^()]*\)\)|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`")
HIDDEN = re.compile("\ue000(\\d+)\ue001")  # a computed text while the words are split
CONTINUED = "\ue002"  # the end of a line that the next one continues
ENDS = ("&&", "||", ";", "|", "&")  # of a command
KEYWORDS = ("if", "then", "elif", "else", "do", "while", "until", "time", "!", "{", "(", "exec", "nohup", "command")
# Signs of the shell within quotes, where they are plain text.
QUOTED = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*\"""")
SIGNS = {ord(sign): 0xE010 + number for number, sign in enumerate("<>|&;")}
PLAIN = {code: sign for sign, code in SIGNS.items()}
REDIRECT = re.compile(r"(?:\d|&)?(?:>>?|<)(?:&\d|&-)?(.*)", re.DOTALL)


# Characters that the variables of a script become together: a variable of variables could be without end.
MAX_EXPANDED = 1 << 18


class Command(NamedTuple):
    """A command of a script."""

    words: list[str]  # `Unreadable` where a variable is not assigned in the script
    environment: dict[str, str]  # assignments before it
    line: int


class _Variables:
    """What the names of a script stand for, and how much of it was written out."""

    def __init__(self, texts: Mapping[str, str], arrays: dict[str, str]) -> None:
        self.texts = dict(texts)
        self.arrays = arrays  # items as words
        self._expanded = 0  # characters

    def write_out(self, text: str) -> str:
        """Return the text of a variable.

        Raises:
            OverflowError: it is too much, with what was written out before.
        """
        self._expanded += len(text)
        if self._expanded > MAX_EXPANDED:
            raise OverflowError
        return text


def commands(file: Path, text: str, assigned: Mapping[str, str] = MappingProxyType({})) -> list[Command]:
    """Return the commands of a shell script in their order; assignments are none.

    Args:
        file: of the script.
        text: of the script.
        assigned: variables that have a value before.

    Raises:
        LoraError: the variables of `file` become too long a text.
    """
    found: list[Command] = []
    text, arrays = _take_arrays(re.sub(r"\\\r?\n", CONTINUED, text))
    variables = _Variables(assigned, arrays)
    following = 1
    for line in text.split("\n"):
        number, following = following, following + 1 + line.count(CONTINUED)
        line = line.replace(CONTINUED, " ")
        if line.lstrip().startswith("#"):
            continue
        computed: list[str] = []
        try:
            replaced = _replace(line, variables, computed)
        except OverflowError:
            raise LoraError(
                f"{file}:{number}: variables become more than {MAX_EXPANDED:,} characters, and are not read further",
                hint="write their values into the training command",
            ) from None
        for words in _split(replaced):
            plain = [_restored(word, computed) for word in words]
            plain, environment = _without_assignments(plain)
            if plain:
                found.append(Command(plain, environment, number))
            else:
                variables.texts.update(environment)
    return found


def _take_arrays(text: str) -> tuple[str, dict[str, str]]:
    """Return the text without `NAME=(...)`, which may have several lines, and the items of each name as words."""
    arrays: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        items = " ".join(line.partition(" #")[0] for line in match[3].splitlines() if not line.lstrip().startswith("#"))
        arrays[match[1]] = f"{arrays.get(match[1], '')} {items}" if match[2] else items
        return "\n" * match[0].count("\n")

    return ARRAY.sub(take, text), arrays


def _replace(line: str, variables: _Variables, computed: list[str]) -> str:
    def hide(match: re.Match[str]) -> str:
        computed.append(match[0])
        return f"\ue000{len(computed) - 1}\ue001"

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return variables.write_out(variables.texts.get(name, match[0] if match[3] is None else match[3]))

    line = ITEMS.sub(lambda match: variables.write_out(variables.arrays.get(match[1], match[0])), line)
    return COMPUTED.sub(hide, VARIABLE.sub(value, VARIABLE.sub(value, line)))


def _split(line: str) -> list[list[str]]:
    """Return the words of each command of a line, without redirections."""
    line = QUOTED.sub(lambda quoted: quoted[0].translate(SIGNS), line)
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that is not closed
        words = line.split()
    split: list[list[str]] = [[]]
    skip = False  # the file of a redirection
    for word in words:
        redirect = REDIRECT.fullmatch(word)
        if skip:
            skip = False
        elif word in ENDS:
            split.append([])
        elif redirect:
            skip = not redirect[1] and "&" not in word[1:]
        elif word.endswith(";") and len(word) > 1:
            split[-1].append(word[:-1])
            split.append([])
        elif split[-1] or word not in KEYWORDS:
            split[-1].append(word)
    return [part for part in split if part]


def _restored(word: str, computed: list[str]) -> str:
    plain = word.translate(PLAIN)
    text = HIDDEN.sub(lambda match: computed[int(match[1])], plain)
    return Unreadable(text) if text != plain or re.search(r"\$[\w{@*#?]", word) else text


def _without_assignments(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return a command without the assignments before it (`CUDA_VISIBLE_DEVICES=0 python train.py`), and those."""
    assigned: dict[str, str] = {}
    for index, word in enumerate(words):
        match = ASSIGNMENT.fullmatch(word)
        if match:
            assigned[match[1]] = match[2]
        elif word not in ("export", "env"):
            return words[index:], assigned
    return [], assigned
