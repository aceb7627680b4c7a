"""Remove what identifies a machine or a person from text that is published: folders, names, secrets. No torch."""

import getpass
import os
import re
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

SECRET_NAME = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
# Tokens of hubs and trackers, and any long run of letters and digits that is no path.
SERVICE_TOKEN = r"\b(hf|sk|ghp|gho|glpat|xox[abp])[_-][\w-]{8,}|\bBearer\s+\S+"
SECRET_VALUE = re.compile(rf"{SERVICE_TOKEN}|(?<![\w/.-])[A-Za-z0-9+_-]{{32,}}={{0,2}}(?![\w/.-])")
# As in SECRET_VALUE, but with a digit: identifiers in the traceback of a library can be as long.
SECRET_IN_OUTPUT = re.compile(
    rf"{SERVICE_TOKEN}|(?<![\w/.-])(?=[A-Za-z+_-]*\d)[A-Za-z0-9+_-]{{32,}}={{0,2}}(?![\w/.-])"
)
# Of a header, or written as in a program, a query or JSON: `api_key='...'`.
NAMED_SECRET = re.compile(
    r"(?i)(\bBasic\s+|(?:api[_-]?key|token|passw(?:or)?d|secret|credential)s?[\"']?\s*[=:]\s*[\"']?)"
    r"(?!(?:Bearer|Basic)\b)[^\s\"',;&)}\]]{6,}"
)
SHORTEST_SECRET = 6  # characters; a shorter value of a variable is also a word of other texts
# Of a URL, whose password can have any character, or of a proxy without `http://`.
CREDENTIALS = re.compile(r"(?<=://)[^\s'\"<>]*@|(?<!\S)[^/@:\s]+:(?!//)\S*@")
HOMES = re.compile(r"(?<![\w.-])(/home|/Users)/[^/\s:;,'\"]+")
ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
PRIVATE = ("command", "label_mask")  # of a manifest: arguments with paths and addresses; texts of rows


def redact_path(path: str) -> str:
    """Return `path` without the folders of this machine: unchanged if relative or a hub id, else only its last part."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def redact_personal(text: str, *, name: str = "") -> str:
    """Return `text` without secrets, and with ~, USER and HOST for the home folder and the names of user and machine.

    Args:
        text: a line of a report, or the value of an environment variable.
        name: of the variable; the value of one for a secret is not shown at all.
    """
    if SECRET_NAME.search(name):
        return "(set, not shown)" if text else ""
    text = ADDRESS.sub(lambda found: redact_address(found[0]), CREDENTIALS.sub("", text))
    text = SECRET_VALUE.sub("(not shown)", text)
    home, *names = _identity()
    if home not in ("", "/"):
        text = text.replace(home, "~")
    text = HOMES.sub(r"\1/USER", text)
    for found, shown in zip(names, ("USER", "HOST", "HOST"), strict=True):
        if found:
            text = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", shown, text)
    return text


def redact_secrets(text: str) -> str:
    """Return what a library prints without passwords, tokens, and the values of environment variables for secrets.

    Addresses lose user, password and query. Paths and names stay: the text is for this machine.
    """
    if "://" in text:  # a search for addresses takes long in a line without spaces
        text = ADDRESS.sub(lambda found: redact_address(found[0]), CREDENTIALS.sub("", text))
    for secret in _secrets_of_environment():
        text = text.replace(secret, "(not shown)")
    return SECRET_IN_OUTPUT.sub("(not shown)", NAMED_SECRET.sub(r"\1(not shown)", text))


@cache
def _secrets_of_environment() -> tuple[str, ...]:
    """Return what is secret in environment variables, the longest first, also as addresses spell it."""
    found = set[str]()
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not os.path.exists(value):  # such as SSH_AUTH_SOCK
            found.add(value)
        for address in ADDRESS.findall(value):
            found.add(_password(address))
    found |= {quote(secret, safe="") for secret in found} | {unquote(secret) for secret in found}
    return tuple(sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True))


def _password(address: str) -> str:
    """Return the password in an address, or the only name before its host; empty if there is neither."""
    user, _, password = address.partition("://")[2].partition("/")[0].rpartition("@")[0].partition(":")
    return password or user


@cache
def _identity() -> tuple[str, str, str, str]:
    """Return home folder, user name, and the names of the machine; empty where unknown."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without an entry, as in containers
        user = ""
    host = socket.gethostname()
    # `root` and `localhost` name nobody.
    return (
        os.path.expanduser("~"),
        "" if user == "root" else user,
        "" if host == "localhost" else host,
        "" if host.startswith("localhost") else host.partition(".")[0],
    )


def redact_values(value: Any) -> Any:
    """Return a value, as in JSON, with every text and key in it as `redact_text` returns them."""
    if isinstance(value, dict):
        return {redact_text(str(key)): redact_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def without_private(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without what is not sent to others: see PRIVATE."""
    return {key: value for key, value in manifest.items() if key not in PRIVATE}


def redact_text(text: str) -> str:
    """Return `text` without folders of this machine, if it is a path or contains the home or the working folder.

    Addresses lose user, password and query, which can be a signature.
    """
    text = ADDRESS.sub(lambda found: redact_address(found[0]), text)
    if _looks_like_path(text):
        text = redact_path(text)
    # The longest first: the working folder can be in the home folder.
    places = {f"{folder}{os.sep}" for folder in (os.getcwd(), os.path.expanduser("~")) if folder != os.sep}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, "")
    return text


def _looks_like_path(text: str) -> bool:
    """Return whether a text is a path, and no prompt such as `/no_think`: it has folders, or its folder exists."""
    if "\n" in text or len(text) >= 4096 or not text.startswith(("/", "~")):
        return False
    folder = os.path.dirname(os.path.expanduser(text))
    return (folder != os.sep and os.path.isdir(folder)) or (text.count("/") > 1 and not re.search(r"\s", text))


def redact_address(text: str) -> str:
    """Return an address without user, password and query; any other text unchanged."""
    if not re.fullmatch(r"[A-Za-z][\w+.-]*://\S+", text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets that are not those of an IPv6 address
        return text
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
