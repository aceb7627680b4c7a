"""One JSON document on stdout (--json), and nothing else there: other output goes to stderr. No torch."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO

from lora_cli.errors import LoraError
from lora_cli.run.console import CONTROL
from lora_cli.run.read_file import open_regular
from lora_cli.run.worker import is_first_of_run

# JSON escapes only some of the characters that control a terminal, which the document may be printed on.
ESCAPES = {code: f"\\u{code:04x}" for code in CONTROL if code >= 127}


class _Stdout(NamedTuple):
    """The stream and the descriptor that stdout had before it was reserved."""

    stream: TextIO
    descriptor: int


_reserved: _Stdout | None = None


def reserve_stdout() -> None:
    """Send everything to stderr that is written to stdout from now on, also by libraries in C and other processes."""
    global _reserved
    if _reserved is None:
        sys.stdout.flush()
        _reserved = _Stdout(sys.stdout, os.dup(1))
        os.dup2(2, 1)
        sys.stdout = sys.stderr


def release_stdout() -> None:
    """Undo `reserve_stdout`; without it, do nothing."""
    global _reserved
    if _reserved is not None:
        os.dup2(_reserved.descriptor, 1)
        os.close(_reserved.descriptor)
        sys.stdout = _reserved.stream
        _reserved = None


def is_reserved() -> bool:
    """Return whether stdout is reserved for a document."""
    return _reserved is not None


def print_document(value: Mapping[str, Any]) -> None:
    """Print `value` as the document; of several processes of a run, only the first one prints."""
    release_stdout()
    if is_first_of_run():
        text = json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text.translate(ESCAPES) + "\n")
        sys.stdout.flush()


def is_document(file: Path) -> bool:
    """Return whether a file begins as the documents do: rows, one object in a line, do not."""
    with open_regular(file) as opened:
        return opened.read(2) in (b"", b"{\n", b"{}")


def error_document(error: LoraError) -> dict[str, Any]:
    """Return the document of a command that failed."""
    return {
        **error.record,
        "error": error.message,
        "hint": error.hint,
        "details": list(error.details),
        "exit_code": error.exit_code,
    }


def strict(value: Any) -> Any:
    """Return a value that JSON has: null in place of NaN and infinity, text in place of paths, lists of tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return value
