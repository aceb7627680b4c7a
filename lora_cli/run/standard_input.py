"""A recipe on stdin (`-`), read once; worker processes get its text through the pipes of their own stdin. No torch.

A worker's stdin stays open behind the text, because its end tells that the launcher has ended (`signals.py`).
"""

import os
import sys
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run import console

STDIN = Path("-")
BYTES = "LORA_STDIN_BYTES"  # environment variable of a worker: length of the text that the launcher sends
OF_OTHER_LAUNCHER = "RANK"  # of torchrun, accelerate and Slurm scripts; our workers have it too, with BYTES

_text: bytes | None = None  # as read


def receive_stdin() -> None:
    """In a worker, read the text that the launcher sends, before anything else reads its stdin."""
    global _text
    if length := os.environ.pop(BYTES, None):
        parts: list[bytes] = []
        left = int(length)
        while left and (part := os.read(0, left)):
            parts.append(part)
            left -= len(part)
        _text = b"".join(parts)


def read_stdin(*, limit: int) -> bytes:
    """Return what is on stdin, at most `limit` bytes.

    Raises:
        LoraError: it is longer, it is empty, or several processes would have to share it.
    """
    global _text
    if _text is not None:
        return _text
    if OF_OTHER_LAUNCHER in os.environ:
        raise LoraError(
            "-: processes that another program than lora starts cannot share one stdin",
            hint="write the recipe to a file that all of them can read",
        )
    if sys.stdin is None or sys.stdin.closed:
        raise LoraError("-: stdin is closed", hint="pipe a recipe into it: cat recipe.yaml | lora train -")
    if sys.stdin.isatty():
        console.info("reading the recipe from the terminal: end it with Ctrl-D")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise LoraError(f"<stdin> has more than {limit:,} bytes", hint="pipe a recipe into it: cat recipe.yaml | ...")
    _text = data
    return data


def text_for_workers() -> bytes:
    """Return the text that was read from stdin, to send it to workers; empty if none was."""
    return _text or b""


def forget_stdin() -> None:
    """Read stdin anew in the next command of this process: a test."""
    global _text
    _text = None
