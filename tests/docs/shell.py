"""Run a command line of a page: `lora` in this process, which has its libraries, other programs as processes."""

import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from lora_cli import cli

# Programs that a `console` block may call besides `lora`: they are on every machine, and change nothing elsewhere.
PROGRAMS = {"cat", "cp", "diff", "echo", "find", "grep", "head", "ls", "mkdir", "mv", "printf", "rm", "sed", "sort"}
PROGRAMS |= {"tail", "wc"}
ASSIGNMENT = re.compile(r"(?P<name>\w+)=\$\((?P<line>.*)\)\s*")


class Ran(NamedTuple):
    """The end of a command line."""

    code: int  # of its last program
    output: str  # stdout and stderr, as a terminal shows them


class Program(NamedTuple):
    """A program of a pipeline."""

    words: list[str]
    given: str | None  # the file after `<`
    target: str | None  # the file after `>`


def run_line(line: str, logs: Path, variables: dict[str, str]) -> Ran:
    """Run a pipeline in the working folder.

    Args:
        line: words as in a shell, with `|`, `<`, `>`, comments and variables; or `NAME=$(LINE)`.
        logs: a folder outside the working folder, for what is printed.
        variables: those of earlier lines; an assignment adds one.

    Raises:
        ValueError: the line needs a program that a page may not call, or more of the shell.
    """
    if assignment := ASSIGNMENT.fullmatch(line):
        ran = run_line(f"{assignment['line']} > {logs / 'value'}", logs, variables)
        variables[assignment["name"]] = (logs / "value").read_text(encoding="utf-8").rstrip("\n")
        return ran
    code = 0
    with (logs / "terminal").open("wb") as terminal, ExitStack() as opened:
        given = opened.enter_context(open(os.devnull, "rb"))
        for number, program in enumerate(programs := read_line(line, variables)):
            if program.given:
                given = opened.enter_context(open(program.given, "rb"))
            target = program.target or (None if number == len(programs) - 1 else logs / f"pipe-{number}")
            out = opened.enter_context(open(target, "wb")) if target else terminal
            code = _run(program.words, given.fileno(), out.fileno(), terminal.fileno())
            given = opened.enter_context(open(out.name, "rb"))
    return Ran(code, (logs / "terminal").read_text(encoding="utf-8", errors="replace"))


def read_line(line: str, variables: dict[str, str]) -> list[Program]:
    """Return the programs of a pipeline, see `run_line`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|;&()")
    lexer.whitespace_split = True
    programs = [Program([], None, None)]
    words = (re.sub(r"^\$(\w+)$", lambda name: variables[name[1]], word) for word in lexer)
    for word in words:
        program = programs[-1]
        if word == "|":
            programs.append(Program([], None, None))
        elif word == "<":
            programs[-1] = program._replace(given=next(words))
        elif word == ">":
            programs[-1] = program._replace(target=next(words))
        else:
            program.words.append(word)
    for words_of, _, _ in programs:
        if (
            not words_of
            or words_of[0] not in {"lora", *PROGRAMS}
            or any(set(word) <= set("<>|;&()") for word in words_of)
        ):
            raise ValueError(f"{line}: not lora, nor one of {', '.join(sorted(PROGRAMS))}; fence it as bash")
    return programs


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
