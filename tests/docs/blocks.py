"""Fenced blocks of README.md and docs/*.md, and the commands of `console` blocks with the output that a page shows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))}
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>.*)$")


class Block(NamedTuple):
    """A fenced block."""

    page: str  # of PAGES
    line: int  # of its first line of text, from 1
    language: str  # bash, console, yaml, ...; "" if it names none
    title: str  # of `title="FILE"`: the file that a reader makes of it; "" without one
    text: str

    @property
    def place(self) -> str:
        """Where the block is, as an editor reads it."""
        return f"{PAGES[self.page].relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command of a `console` block."""

    line: str  # without `$ ` and continuations
    output: str  # the lines below it, up to the next command


def read_blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order; an unfinished one is an error."""
    blocks, start, opened, text = [], 0, None, []
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                start, opened, text = number + 1, fence, []
        elif fence and fence["fence"] == opened["fence"] and not fence["info"].strip():
            language, _, rest = opened["info"].strip().partition(" ")
            title = re.fullmatch(r'title="([^"]+)"', rest.strip())
            assert title or not rest.strip(), f"{page}:{start}: {rest} is not understood"
            blocks.append(Block(page, start, language, title[1] if title else "", "".join(f"{one}\n" for one in text)))
            opened = None
        else:
            text.append(line.removeprefix(opened["indent"]))
    assert opened is None, f"{page}:{start}: the block does not end"
    return blocks


def read_commands(text: str) -> Iterator[Command]:
    """Yield the commands of a `console` block: lines that begin with `$ `, and go on after a backslash at the end."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"a block begins with output: {parts[0][:80]}"
    for part in parts[1:]:
        lines = part.split("\n")
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield Command(" ".join(line.rstrip("\\").strip() for line in lines[:count]), "\n".join(lines[count:]).strip())
