"""Run a command line of a page: `lora` in this process, which has its libraries, other programs in bash."""

import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_cli import cli

# Programs that a `console` block may call besides `lora`: they are on every machine, and change nothing elsewhere.
PROGRAMS = {"cat", "cp", "diff", "echo", "find", "grep", "head", "ls", "mkdir", "mv", "printf", "rm", "sed", "sort"}
PROGRAMS |= {"tail", "wc"}


class Ran(NamedTuple):
    """The end of a command line."""

    code: int  # of its last program
    output: str  # stdout and stderr, as a terminal shows them


def run_line(line: str, log: Path) -> Ran:
    """Run a pipeline in the working folder; `> FILE` at its end is understood.

    Args:
        line: words as in a shell, with `|`, `>` and comments.
        log: a file outside the working folder for what is printed.

    Raises:
        ValueError: the line needs a program that a page may not call, or more of the shell.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    target = None
    if len(words) > 2 and words[-2] == ">":
        target, words = words[-1], words[:-2]
    programs = _split(words)
    for program in programs:
        if not program or program[0] not in {"lora", *PROGRAMS} or any(set(word) <= set("();<>|&") for word in program):
            raise ValueError(f"{line}: not lora, nor one of {', '.join(sorted(PROGRAMS))}; fence it as bash")
    code, data = 0, b""
    with log.open("wb") as terminal:
        for number, program in enumerate(programs):
            is_last = number == len(programs) - 1
            with (
                open(os.devnull, "rb") if number == 0 else _file_with(data, log.with_suffix(".in")) as given,
                open(target, "wb") if target else log.with_suffix(".out").open("wb") as result,
            ):
                own = terminal if is_last and not target else result
                code = _run(program, given.fileno(), own.fileno(), terminal.fileno())
            data = b"" if is_last else log.with_suffix(".out").read_bytes()
    return Ran(code, log.read_text(encoding="utf-8", errors="replace"))


def _split(words: list[str]) -> list[list[str]]:
    programs: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            programs.append([])
        else:
            programs[-1].append(word)
    return programs


def _file_with(data: bytes, path: Path) -> BinaryIO:
    path.write_bytes(data)
    return path.open("rb")


def _run(words: list[str], given: int, out: int, err: int) -> int:
    if words[0] != "lora":
        return subprocess.run(words, stdin=given, stdout=out, stderr=err, check=False).returncode
    with _streams(given, out, err):
        try:
            sys.argv = words
            cli.main()
        except SystemExit as request:
            return int(request.code or 0)
        except BaseException:  # noqa: BLE001 - as the interpreter does: the traceback is what a reader would see
            traceback.print_exc()
            return 1
    return 0


@contextmanager
def _streams(given: int, out: int, err: int) -> Iterator[None]:
    """Within the block, these files are the standard streams, for Python and for libraries."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    kept = [os.dup(number) for number in range(3)]
    for number, descriptor in enumerate((given, out, err)):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
        for number, descriptor in enumerate(kept):
            os.dup2(descriptor, number)
            os.close(descriptor)
