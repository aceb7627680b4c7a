"""Questions to a person at a terminal: a prompt with a default, asked again until the answer is valid. No torch."""

import sys
from collections.abc import Callable
from typing import TypeVar

from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.os_errors import as_lora_error

T = TypeVar("T")
ReadLine = Callable[[], str]  # returns a line with its line break, or an empty text at the end of the input

NOTHING_WRITTEN = "the questions have ended without an answer: nothing was written"


def check_terminal() -> None:
    """Check that somebody can answer.

    Raises:
        LoraError: stdin or stderr is no terminal.
    """
    for name, stream in (("stdin", sys.stdin), ("stderr", sys.stderr)):
        if stream is None or not stream.isatty():
            raise LoraError(
                f"--interactive asks questions, and {name} is not a terminal",
                hint="run it in a terminal; or `lora init` lists recipes, and `lora init NAME` writes one to edit",
            )


def ask(question: str, parse: Callable[[str], T], *, default: str = "", read: ReadLine | None = None) -> T:
    """Ask a question, and return what `parse` makes of the answer.

    Args:
        question: without a question mark; the default is shown after it.
        parse: returns the value of an answer; an error of the user is shown, and the question is asked again.
        default: the answer that an empty line stands for; without one, an empty line is asked again.
        read: reads a line; None: from stdin.

    Raises:
        LoraError: the input ends (Ctrl-D).
    """
    while True:
        console.err.file.write(f"{question}{f' [{default}]' if default else ''}: ")
        console.err.file.flush()
        line = (read or sys.stdin.readline)()
        if not line:
            console.err.file.write("\n")
            raise LoraError(NOTHING_WRITTEN, hint="start again, or `lora init NAME` writes a recipe", exit_code=1)
        answer = line.strip() or default
        if not answer:
            console.info("  an answer is needed")
            continue
        try:
            return parse(answer)
        except (LoraError, OSError) as error:  # OSError: a path that is too long, or without permission
            wrong = error if isinstance(error, LoraError) else as_lora_error(error)
            if wrong is None:
                raise
            tell(wrong)


def tell(error: LoraError) -> None:
    """Print what is wrong with an answer, which is asked for again, in one line behind the details."""
    for line in (*error.details, "; ".join(filter(None, (error.message, error.hint)))):
        console.info(f"  {line}")
