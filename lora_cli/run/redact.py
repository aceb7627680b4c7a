"""Remove what identifies a machine or a person from text that is published: folders, names, secrets. No torch."""

import getpass
import os
import re
import socket
from functools import cache
from pathlib import Path

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
# Tokens of hubs and trackers, and any long run of letters and digits that is no path.
SECRET_VALUE = re.compile(
    r"\b(hf|sk|ghp|gho|glpat|xox[abp])[_-]\w{8,}|(?<![\w/.-])[A-Za-z0-9+_-]{32,}={0,2}(?![\w/.-])"
)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")  # of a URL


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
    text = SECRET_VALUE.sub("(not shown)", CREDENTIALS.sub("", text))
    home, *names = _identity()
    if home not in ("", "/"):
        text = text.replace(home, "~")
    for found, shown in zip(names, ("USER", "HOST", "HOST"), strict=True):
        if found:
            text = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", shown, text)
    return text


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
