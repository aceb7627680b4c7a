"""The Hugging Face hub: asked once whether it answers, before a library waits for it again and again. No torch.

Only the time until the first answer is bounded, so that downloads over slow connections are not affected.
"""

import os
import queue
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lora_cli.errors import LoraError

FIRST_ANSWER_S = 1.5  # seconds until it is asked again
LAST_ANSWER_S = 4.5  # seconds for both attempts together
UNAVAILABLE = (500, 502, 503, 504)  # HTTP statuses after which the libraries would ask again for half a minute
PAUSE_S = 1.0  # seconds from an attempt that fails at once to the next one
OFFLINE = "HF_HUB_OFFLINE"
BEFORE = "LORA_HF_HUB_OFFLINE"  # environment variable with the value of OFFLINE that `ask_hub` has replaced, or empty
HUB_ID_HINT = "correct the path; a hub id is NAME or ORG/NAME, of at most 96 letters, digits and single - . _"
USING_CACHE = "the hub does not answer: using the files in the cache"

# By the address of a hub, and the path that it was asked for: why it does not answer; None if it does.
_answers: dict[str, dict[str, str | None]] = {}


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id; nothing is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        try_to_load_from_cache(text, "config.json")  # checks the id first
    except HFValidationError:
        return False
    return True


def ask_hub(info: Callable[[str], None], *, about: str = "") -> str | None:
    """Ask the hub for an answer, twice at most, in less than 5 seconds. Without one, use only the cache from now on.

    It is asked for what a library asks for first, because a hub whose pages answer may not send files. Where a library
    got no answer, it would try again for half a minute, and for six if the hub keeps silent.

    Args:
        info: prints that the hub is asked again.
        about: path of the first request: `org/name/resolve/main/config.json`, `api/datasets/org/name`.

    Returns:
        Why the hub does not answer; None if it does, or if HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.constants import ENDPOINT

    answers = _answers.setdefault(ENDPOINT, {})
    problem = next(filter(None, answers.values()), None)
    if problem is None and about not in answers and not is_offline_mode():
        problem = answers[about] = _find_problem(ENDPOINT, f"/{about}" if about else "", info)
        if problem is not None:
            _go_offline()
    return problem


def environment_of_others() -> dict[str, str]:
    """Return the environment without what `ask_hub` has decided for models and data, also in the process above.

    A hub that was slow once need not keep a tracker offline for the whole run.
    """
    environment = dict(os.environ)
    if (before := environment.pop(BEFORE, None)) is not None:
        environment[OFFLINE] = before
    return {name: value for name, value in environment.items() if name != OFFLINE or value}


def no_answer_error(name: str, problem: str, *, key: str) -> LoraError:
    """Return the error about the repository `name`, which `key` of the recipe names, and which is not in the cache."""
    return LoraError(
        f"{key}: {name} is not in the cache, and the hub does not answer (asked twice): {problem}",
        hint=f"check {name}, the network and HF_ENDPOINT; to work offline, run `hf download {shlex.quote(name)}` where "
        "there is a network, and copy the folder that it prints to this machine",
    )


def _find_problem(address: str, path: str, info: Callable[[str], None]) -> str | None:
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    start = time.monotonic()
    problem = "no answer"
    for seconds in (FIRST_ANSWER_S, LAST_ANSWER_S):
        # In a thread, because the search for an address by DNS has no timeout.
        threading.Thread(target=lambda: answers.put(_ask(f"{address}{path}")), daemon=True).start()
        try:  # the second time, also the answer to the first attempt
            if (answer := answers.get(timeout=start + seconds - time.monotonic())) is None:
                return None
            problem = answer
        except queue.Empty:
            pass
        if seconds < LAST_ANSWER_S:
            info(f"the hub ({address}) does not answer ({problem}): trying again")
            time.sleep(max(0.0, start + PAUSE_S - time.monotonic()))
    return f"{address}: {problem}"


def _ask(address: str) -> str | None:
    """Return why the hub gives no answer that the libraries can use; None if it does."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    client_class: Any = type(get_session())  # of httpx or httpx2, depending on the version: proxies and certificates
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # the base class of its errors
    invalid_address: type[Exception] = import_module(http_error.__module__.partition(".")[0]).InvalidURL
    try:
        with client_class(timeout=LAST_ANSWER_S, follow_redirects=True) as client:
            status: int = client.head(address).status_code
    except (http_error, invalid_address, OSError, ValueError) as error:
        return re.sub(r"^\[Errno -?\d+\] ", "", (str(error).splitlines() or [type(error).__name__])[0])
    return f"HTTP status {status}" if status in UNAVAILABLE else None


def _go_offline() -> None:
    """Let the libraries use their caches only; workers, which load the same, inherit it."""
    from huggingface_hub import constants

    os.environ.setdefault(BEFORE, os.environ.get(OFFLINE, ""))
    os.environ[OFFLINE] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
