"""Read a small file of unknown origin: regular files only, bounded size, UTF-8, JSON objects; errors name it. No torch.

A pipe (FIFO) or a device under a file's name would be read forever; a damaged file raises many kinds of exceptions.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli.errors import LoraError

MAX_TEXT_BYTES = 256 << 20  # tokenizers of large vocabularies are the largest text files: some tens of megabytes
MAX_SHOWN = 200  # characters of a path in a message
RESTORE = "restore the file from its origin"


class UnreadableError(LoraError):
    """The operating system refuses to open a file, which may be whole: nobody may take it for a damaged one."""


# Of a path that leads nowhere: what is there is no file that anything could be read from.
_NO_FILE = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENOTDIR)


def open_regular(path: Path, *, hint: str = RESTORE) -> BinaryIO:
    """Open the regular file `path`, or the one that a link names, for reading; it never waits for a pipe.

    Raises:
        LoraError: `path` is missing, or not a regular file.
        UnreadableError: the system refuses to open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        found = "is a link to nothing" if os.path.islink(path) else "does not exist"
        raise LoraError(f"{path} {found}", hint=hint) from None
    except OSError as error:  # no permission, a loop of links, a name that is too long
        error_type = LoraError if error.errno in _NO_FILE else UnreadableError
        raise error_type(f"{shorten_path(path)} cannot be read: {error.strerror}", hint=hint) from None
    except ValueError:
        raise LoraError(f"{shorten_path(path)}: a path cannot contain a NUL character", hint=hint) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        kind = _kind(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        raise LoraError(f"{path} is {kind}, not a file", hint=hint)
    return os.fdopen(descriptor, "rb")


def shorten_path(path: Path) -> str:
    """Return a path for a message: one printable line of at most 200 characters, its end in any case."""
    text = str(path)
    text = text if len(text) <= MAX_SHOWN else f"...{text[3 - MAX_SHOWN :]}"
    return text if text.isprintable() else repr(text)[1:-1]


def read_bytes(path: Path, *, limit: int = MAX_TEXT_BYTES, hint: str = RESTORE) -> bytes:
    """Return the contents of a regular file.

    Raises:
        LoraError: it cannot be read, see `open_regular`, or is larger than `limit` bytes.
    """
    with open_regular(path, hint=hint) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LoraError(f"{path} has more than {limit:,} bytes", hint=hint)
    return data


def read_text(path: Path, *, limit: int = MAX_TEXT_BYTES, hint: str = RESTORE) -> str:
    """Return the contents of a regular file as text.

    Raises:
        LoraError: it cannot be read, see `read_bytes`, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit, hint=hint).decode()
    except UnicodeDecodeError as error:
        raise LoraError(f"{path} is not UTF-8 text: byte {error.start:,} is wrong", hint=hint) from None


def read_json_object(path: Path, *, limit: int = MAX_TEXT_BYTES, hint: str = RESTORE) -> dict[str, Any]:
    """Return the JSON object in a regular file.

    Raises:
        LoraError: it cannot be read, see `read_text`, or is not one JSON object.
    """
    text = read_text(path, limit=limit, hint=hint)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets nested thousands deep
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise LoraError(f"{path} is not JSON: {reason}", hint=hint) from None
    if not isinstance(value, dict):
        raise LoraError(f"{path} has {_json_kind(value)} in place of a JSON object", hint=hint)
    return value


def check_folder_readable(folder: Path) -> None:
    """Raise if there is a folder without permission to read it, in which nothing would be found.

    Raises:
        UnreadableError: it is one.
    """
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UnreadableError(f"{shorten_path(folder)} cannot be read: Permission denied", hint="check its permissions")


def describe_kind(path: Path) -> str:
    """Return what there is at a path that exists: `a pipe`, `a link to nothing`."""
    try:
        return _kind(path.stat().st_mode)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:  # a loop of links, a folder without permission
        return f"a path that cannot be followed ({error.strerror})"


def printable(value: object, limit: int = 100) -> str:
    """Return a value of a file as text for a message: in one line, control characters escaped, cut at `limit`."""
    text = value if isinstance(value, str) else str(value)
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: limit + 1])
    return f"{shown[:limit]}..." if len(text) > limit else shown


def as_json(value: object) -> str:
    """Return a value from a JSON file for a message, as it would stand there: `"1"` is not `1`."""
    return printable(json.dumps(value, ensure_ascii=False))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
