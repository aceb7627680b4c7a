"""Remove the folders of this machine, and secrets of addresses, from what is published or sent. No torch."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit


def redact_path(path: str) -> str:
    """Return `path` without the folders of this machine: unchanged if relative or a hub id, else only its last part."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def redact_values(value: Any) -> Any:
    """Return a value, as in JSON, with every text and key in it as `redact_text` returns them."""
    if isinstance(value, dict):
        return {redact_text(str(key)): redact_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return `text` without folders of this machine, if it is a path or contains the home or the working folder.

    An address loses user, password and query, which can be a signature.
    """
    if "\n" not in text and len(text) < 4096:
        text = redact_address(redact_path(text))
    # The longest first: the working folder can be in the home folder.
    places = {f"{folder}{os.sep}" for folder in (os.getcwd(), os.path.expanduser("~")) if folder != os.sep}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, "")
    return text


def redact_address(text: str) -> str:
    """Return an address without user, password and query; any other text unchanged."""
    if not re.fullmatch(r"[A-Za-z][\w+.-]*://\S+", text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets that are not those of an IPv6 address
        return text
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
