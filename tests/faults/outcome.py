"""Run one case of a fault campaign in a forked process, and tell how it ended: done, refused, traceback, signal, hang.

A case that crashes or never ends takes only its own process with it. The process is forked from this one, which has
imported everything: a case costs milliseconds, not the seconds of a new `lora` process.
"""

import contextlib
import io
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from lora_cli.errors import LoraError

SECONDS = 60.0  # a case that takes longer hangs: the limits of the tool itself are a sixth of it
WELL = ("done", "refused")  # kinds of outcomes that are not faults


class Outcome(NamedTuple):
    """How a case ended."""

    # done, refused (an error with a hint), or a fault: traceback, signal, hang, silent (another result than it should
    # be, without a message), message (an error that is not one line, or has no hint)
    kind: str
    detail: str = ""  # the message, the last line of the traceback, the number of the signal

    @property
    def is_fault(self) -> bool:
        """Whether the tool did what it must not do."""
        return self.kind not in WELL


def silent(detail: str) -> Outcome:
    """Return the outcome of a result that is wrong, which a case returns itself."""
    return Outcome("silent", detail)


def run_case(case: Callable[[], Outcome | None], *, seconds: float | None = None) -> Outcome:
    """Call `case` in a forked process; its return value is the outcome, None for a result that is right.

    A LoraError of it is the outcome `refused`, or `message` if it is not one line with a hint.
    """
    seconds = SECONDS if seconds is None else seconds
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        outcome = _outcome_of(case)
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as stream:
            pickle.dump(outcome, stream)
        os._exit(0)
    os.close(writing)
    data = b""
    with os.fdopen(reading, "rb", buffering=0) as stream:
        while select.select([stream], [], [], seconds)[0]:
            if not (block := stream.read(1 << 16)):
                break
            data += block
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("hang", f"no result after {seconds:.0f} s")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome("signal", str(os.WTERMSIG(status)))
    result = pickle.loads(data) if data else Outcome("signal", f"exit code {os.waitstatus_to_exitcode(status)}")
    assert isinstance(result, Outcome)
    return result


def run_here(case: Callable[[], Outcome | None]) -> Outcome:
    """Call `case` in this process, which is a thousand times faster, for code that has its own limits."""
    return _outcome_of(case)


def _outcome_of(case: Callable[[], Outcome | None]) -> Outcome:
    output = io.StringIO()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            outcome = case() or Outcome("done")
    except LoraError as error:
        return outcome_of_error(error)
    except BaseException:  # noqa: BLE001 - the campaign reports every kind of exception, also those of Rust (PyO3)
        lines = traceback.format_exc().splitlines()
        place = next((line.strip() for line in reversed(lines) if "lora_cli" in line), "")
        return Outcome("traceback", f"{lines[-1][:300]} ({place})")
    return outcome


def outcome_of_error(error: LoraError) -> Outcome:
    """Return `refused`, or `message` for an error that is not one line with a hint of one line."""
    lines = [error.message, *error.details, *([error.hint] if error.hint else [])]
    if error.hint is None and not error.details:
        return Outcome("message", f"no hint: {error.message[:200]}")
    if wrong := [line for line in lines if len(line.splitlines()) != 1 or not line.isprintable() or len(line) > 2000]:
        return Outcome("message", f"not one line: {wrong[0][:200]!r}")
    return Outcome("refused", error.message[:300])


def main_outcome(arguments: list[str]) -> Outcome | None:
    """Run a command in this process, as the console script does, and return its outcome; for use inside a case."""
    from lora_cli import cli

    sys.argv = ["lora", *arguments]
    errors = io.StringIO()
    code: object = 0
    with contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as request:
            code = request.code or 0
    lines = errors.getvalue().splitlines()
    if code == 0:
        return None
    if "Traceback (most recent call last):" in lines:
        return Outcome("traceback", lines[-1][:300])
    if code not in (1, 2) or not any(line.startswith("error: ") for line in lines[-2:]):
        return Outcome("message", f"exit code {code}: {' / '.join(lines[-3:])[:300]}")
    return Outcome("refused", " / ".join(lines[-2:])[:300])
