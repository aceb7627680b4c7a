"""The hub as a place to write to: names of repositories, the token, and the hub's errors as one line each. No torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from lora_cli.errors import LoraError, first_line
from lora_cli.run.system_errors import OF_THIS_MACHINE, system_error

NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)  # of an owner, or of a repository
MAX_NAME = 96  # characters of owner and name together
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access (huggingface.co/settings/tokens)"
TRY_AGAIN = "run the command again: what has arrived is not uploaded twice"


class Account(NamedTuple):
    """Whose token it is."""

    name: str
    organizations: tuple[str, ...]
    role: str | None  # of the token: read, write, fineGrained

    def describe(self) -> str:
        """Return it in words: `me (organizations: a, b)`."""
        return f"{self.name} (organizations: {', '.join(self.organizations) or 'none'})"


def check_repository_name(name: str) -> None:
    """Check the name of a repository before anything is asked or read.

    Raises:
        LoraError: it is not `owner/name` in the characters that the hub allows.
    """
    owner, slash, rest = name.partition("/")
    hint = "write owner/name, with letters, digits, - _ and . only, such as my-name/my-adapter"
    if not slash or not rest:
        raise LoraError(f"{name} is not the name of a repository: it has no {'name' if slash else 'owner'}", hint=hint)
    if "://" in name or "/" in rest:
        raise LoraError(f"{name} is not the name of a repository", hint=hint)
    wrong = next((part for part in (owner, rest) if not NAME.fullmatch(part)), None)
    if wrong is not None or "--" in name or ".." in name:
        raise LoraError(
            f"{name} is not the name of a repository: the hub does not allow {wrong or '-- or ..'}", hint=hint
        )
    if name.endswith(".git") or len(name) > MAX_NAME:
        reason = "it ends in .git" if name.endswith(".git") else f"it has more than {MAX_NAME} characters"
        raise LoraError(f"{name} is not the name of a repository: {reason}", hint=hint)


def why_no_upload() -> LoraError | None:
    """Return why nothing can be uploaded from here, without asking the hub; None if it may be possible."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        return LoraError(
            "HF_HUB_OFFLINE is set, and an upload needs the hub", hint="unset it: HF_HUB_OFFLINE=0 lora push ..."
        )
    if get_token() is None:
        return LoraError("there is no token of the hub on this machine", hint=LOG_IN)
    return None


def read_account(api: Any) -> Account:
    """Ask the hub whose token it is.

    Raises:
        LoraError: the token is not valid, or can only read.
    """
    with hub_errors("the hub", account=None):
        answer = api.whoami()
    access = (answer.get("auth") or {}).get("accessToken") or {}
    names = tuple(each["name"] for each in answer.get("orgs") or () if "name" in each)
    account = Account(str(answer.get("name")), names, access.get("role"))
    if account.role == "read":
        name = access.get("displayName")
        raise LoraError(f"the token of {account.name}{f' ({name})' if name else ''} can only read", hint=LOG_IN)
    return account


@contextmanager
def hub_errors(repository: str, *, account: Account | None) -> Iterator[None]:
    """Turn the exceptions of the hub's client into one line.

    Args:
        repository: that is written to, for messages.
        account: whose token it is, for hints; None if that is not known.
    """
    from huggingface_hub.errors import HfHubHTTPError

    network: type[Exception] = HfHubHTTPError.__bases__[0]  # the base of httpx's errors
    known: tuple[type[Exception], ...] = (network, OSError, ValueError, RuntimeError, *_storage_errors())
    try:
        yield
    except known as error:
        local = system_error(error)
        if local is not None and local.errno in OF_THIS_MACHINE:
            raise
        raise _as_lora_error(error, repository, account) from error


def _storage_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of Xet, the storage of large files, that are none of Python's; none without its client."""
    try:
        import hf_xet
    except ImportError:
        return ()
    return (hf_xet.XetAuthenticationError, hf_xet.XetObjectNotFoundError)


def _as_lora_error(error: BaseException, repository: str, account: Account | None) -> LoraError:
    from huggingface_hub.errors import HfHubHTTPError

    # The client wraps what happened to one file.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, LoraError):  # of `hub_limits`
        return cause
    owner = repository.partition("/")[0]
    whose = f"your token is of {account.describe()}" if account else LOG_IN
    if not isinstance(cause, HfHubHTTPError):
        said = "no answer in time" if _is_timeout(cause) else first_line(cause)
        hint = whose if re.search(r"\b(401|403)\b", said) else TRY_AGAIN
        hint = f"wait some minutes, and {TRY_AGAIN}" if "429" in said else hint
        what = f"{repository}: the upload failed" if account else "the hub does not say whose token it is"
        return LoraError(f"{what}: {said}", hint=hint, exit_code=1)
    status, said = cause.response.status_code, _said(cause)
    match status:
        case 401 if account is None:
            return LoraError("the hub does not accept the token of this machine", hint=LOG_IN)
        case 401:
            return LoraError(
                f"{repository}: the hub does not accept the token any more (401){said}",
                hint=f"{LOG_IN}; then {TRY_AGAIN}",
                exit_code=1,
            )
        case 403:
            return LoraError(
                f"{repository}: the token may not write there (403){said}",
                hint=f"{whose}; to write to {owner}, use a token of it with write access",
            )
        case 404:
            return LoraError(f"{repository}: the hub has no such owner or repository (404){said}", hint=whose)
        case 412 | 409:
            return LoraError(
                f"{repository} was changed by somebody else meanwhile ({status}){said}",
                hint="look at it, and run the command again",
                exit_code=1,
            )
        case 429:
            return LoraError(
                f"{repository}: too many requests (429){said}",
                hint=f"wait some minutes, and {TRY_AGAIN}",
                exit_code=1,
            )
        case 400:
            return LoraError(f"{repository}: the hub refuses it (400){said}", hint="correct what it names")
        case _:
            return LoraError(f"{repository}: the hub answered with status {status}{said}", hint=TRY_AGAIN, exit_code=1)


def _is_timeout(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    client = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # httpx or httpx2
    return isinstance(error, client.TimeoutException)


def _said(error: Any) -> str:
    """Return what the hub says about an error, for the end of a message."""
    text = (error.server_message or "").strip()
    return f": {first_line(ValueError(text))}" if text else ""
