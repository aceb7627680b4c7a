"""Limits of time for an upload: the hub's client would wait without end for a server that keeps silent. No torch.

Three of them. A request waits for a while, and is repeated once. A server that asks to come back much later ends the
upload at once. And a time for all of it, by the size of the files, ends what the first two do not see: a server that
sends or takes a byte now and then, and the storage of large files, whose client in Rust has its own connections.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.run import console, json_output
from lora_cli.run.hub_account import TRY_AGAIN
from lora_cli.run.print_error import error_lines
from lora_cli.run.signals import end_process

CONNECT_S = 30.0
ANSWER_S = 120.0  # that a server may keep silent, or take no byte: it may have to put the parts of a file together
LONGEST_WAIT_S = 60  # that a server may ask for, before the client asks again
WHOLE_S = 600.0  # for the upload of nothing; above the sum of what follows each other when servers keep silent
SLOWEST = 64 << 10  # bytes per second of an upload that has a chance
TOO_MANY, SERVER_FAILED, UNAVAILABLE = 429, 500, 503  # HTTP statuses
# Of Xet, the storage of large files. It would try again five times with pauses of up to 4 minutes, and wait for 5 each
# time. Its wait for an answer includes sending up to 64 MB, so it is longer for large files.
XET_RETRIES = "3"
XET_ANSWER_S = (60.0, 300.0)


@contextmanager
def limited_upload(repository: str, size: int) -> Iterator["Limits"]:
    """Within the block, let the hub's client end in a bounded time.

    Args:
        repository: that is written to, for messages.
        size: bytes of the files.
    """
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import logging as hub_logging

    limits = Limits(repository)
    default: Any = get_session()
    kind, hooks = type(default), default.event_hooks
    ours = {name: [*hooks[name], getattr(limits, name)] for name in hooks}
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", XET_RETRIES)
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{_xet_answer_s(size):.0f}s")
    set_client_factory(lambda: kind(event_hooks=ours, follow_redirects=True, timeout=None))
    timer = threading.Timer(WHOLE_S + size / SLOWEST, _end, [repository, WHOLE_S + size / SLOWEST, limits])
    timer.daemon = True
    timer.start()
    verbosity = hub_logging.get_verbosity()
    if not console.verbose:  # of each attempt that fails, it prints the address, which can be a signed one
        hub_logging.set_verbosity(logging.ERROR)
    try:
        yield limits
    finally:
        hub_logging.set_verbosity(verbosity)
        timer.cancel()
        set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=None))


class Limits:
    """Hooks of the client of HTTP, by the names that it gives them."""

    def __init__(self, repository: str) -> None:
        self.answer_s = ANSWER_S
        self.details: tuple[str, ...] = ()  # lines on what is not uploaded yet
        self._repository = repository
        self._failed: dict[str, tuple[float, str]] = {}  # by request: when it was first sent, and what came

    def request(self, request: Any) -> None:
        """Set the times that a request waits; tell that it is repeated, or raise if it was without an answer.

        Raises:
            LoraError: there is no answer to what was sent twice.
        """
        now, key = time.monotonic(), f"{request.method} {request.url}"
        first, problem = self._failed.setdefault(key, (now, ""))
        waited = now - first
        if not problem and waited > 2 * self.answer_s + int(request.headers.get("Content-Length", 0)) / SLOWEST:
            raise LoraError(
                f"{self._repository}: {request.url.host} does not answer: asked again and again for {waited:.0f} s",
                hint=f"check the network, and {TRY_AGAIN}",
                exit_code=1,
            )
        if first != now:
            console.info(f"{request.url.host} {problem or 'has not answered'}: trying again")
        times: dict[str, float | None] = request.extensions.setdefault("timeout", {})
        for name, limit in (("connect", CONNECT_S), ("read", self.answer_s), ("write", self.answer_s)):
            times[name] = min(times.get(name) or limit, limit)

    def response(self, response: Any) -> None:
        """Raise if the server asks to come back later than the client should wait for.

        Raises:
            LoraError: it does.
        """
        key, status = f"{response.request.method} {response.request.url}", response.status_code
        self._failed.pop(key, None)
        if status == TOO_MANY or status >= SERVER_FAILED:
            self._failed[key] = (0.0, f"answers with status {status}")
        wait = _wanted_wait(response)
        if wait > LONGEST_WAIT_S:
            raise LoraError(
                f"{self._repository}: {response.request.url.host} takes no more requests for {_duration(wait)} "
                f"({status})",
                hint=f"wait, and then {TRY_AGAIN}",
                exit_code=1,
            )


def _wanted_wait(response: Any) -> int:
    """Return the seconds after which a server that refuses wants to be asked again; 0 if it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # documented

    if response.status_code not in (TOO_MANY, UNAVAILABLE):
        return 0
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = response.headers.get("Retry-After", "")
    return int(text) if text.isdecimal() else 0


def _xet_answer_s(size: int) -> float:
    least, most = XET_ANSWER_S
    return min(most, least + size / SLOWEST)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def _end(repository: str, seconds: float, limits: Limits) -> None:
    """End the process: no other means ends a call of a library that waits in C or Rust, and its threads."""
    error = LoraError(
        f"{repository}: the upload has not ended after {_duration(seconds)}",
        hint=f"check the network, and {TRY_AGAIN}",
        details=limits.details,
        exit_code=1,
    )
    if json_output.is_reserved():
        json_output.print_document(json_output.error_document(error))
    end_process(error.exit_code, error_lines(error))
