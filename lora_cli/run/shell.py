"""Paths in the commands that messages show, such that a shell, or Python, takes each as one text. No torch."""

import json
import os
import shlex


def shell_path(path: str | os.PathLike[str]) -> str:
    """Return a path as it is written in a shell: quoted where it has spaces or other special characters.

    A name that begins with a dash would be taken for an option: `./` is put before it.
    """
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") and text != "-" else text
    if text.isprintable():
        return shlex.quote(text)
    # Messages escape what cannot be printed; in these quotes, a shell reads the escapes.
    return "$'" + "".join(map(_escaped, os.fsencode(text))) + "'"


def python_text(path: str | os.PathLike[str]) -> str:
    """Return a path as a text of Python in double quotes, for a command that runs Python."""
    return json.dumps(os.fspath(path), ensure_ascii=False)


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
