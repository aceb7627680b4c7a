"""Start `lora` commands as processes within milliseconds: forks of a server process that has imported the libraries.

Tests that kill a command or send signals to it need a process for each; a new interpreter would take seconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lora_cli.__main__ import main
from lora_cli.run.quick_imports import quick_imports
from lora_cli.run.signals import SIGNALS

COMMANDS = (
    "adapter",
    "chat",
    "check",
    "evaluate",
    "export",
    "merge",
    "report",
    "train",
)  # modules of lora_cli/commands


class Running(NamedTuple):
    """A running command."""

    pid: int
    folder: Path  # its working folder
    out: Path  # file of its stdout
    err: Path  # file of its stderr

    def messages(self) -> str:
        """Return what it has written to stderr so far."""
        return self.err.read_text(errors="replace")


class WarmLora:
    """The client of one server process; use it as a context manager."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_lora"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        self._codes: dict[int, int] = {}

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        setup: str = "",
    ) -> Running:
        """Start `lora ARGUMENTS` in `folder`.

        Args:
            arguments: of the command line.
            folder: working folder; the files `.stdout` and `.stderr` are written there.
            environment: variables in addition to those of this process.
            setup: Python code that the process runs first, such as `os.close(1)`.
        """
        out, err = folder / ".stdout", folder / ".stderr"
        request = {
            "arguments": list(map(str, arguments)), "folder": str(folder), "out": str(out), "err": str(err),
            "environment": dict(environment or {}), "setup": setup,
        }  # fmt: skip
        for file in (out, err):
            file.write_bytes(b"")
        return Running(int(self._ask(request)), folder, out, err)

    def poll(self, running: Running) -> int | None:
        """Return the exit code of a command (negative: the signal that ended it); None while it runs."""
        if running.pid not in self._codes and (code := self._ask({"poll": running.pid})) is not None:
            self._codes[running.pid] = code
        return self._codes.get(running.pid)

    def wait(self, running: Running, *, seconds: float = 120) -> int:
        """Return the exit code of a command, as soon as it has ended.

        Raises:
            TimeoutError: it still runs after `seconds`; it is killed.
        """
        deadline = time.monotonic() + seconds
        while (code := self.poll(running)) is None:
            if time.monotonic() > deadline:
                os.kill(running.pid, 9)
                raise TimeoutError(f"after {seconds:.0f} s: {running.messages()[-1000:]}")
            time.sleep(0.005)
        return code

    def _ask(self, request: Mapping[str, object]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> dict[str, Any] | None:
    """Answer requests until stdin ends, then return None; in each forked process, return its request."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            # Signals wait until the process can handle them, as after the start of an interpreter.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            answer = os.fork()
            if answer == 0:
                return request
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def become_lora(request: dict[str, Any]) -> None:
    """Run one command in this process, with the state of a new one."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for descriptor, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY), (request["err"], os.O_WRONLY)]
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["lora", *request["arguments"]]
    exec(request["setup"])
    main()


def _import_libraries() -> None:
    from importlib import import_module

    with quick_imports():
        for name in COMMANDS:
            import_module(f"lora_cli.commands.{name}")
    # As on a machine with one core, so that sums are rounded in the same way as in the tests.
    os.sched_getaffinity = lambda _: {0}  # type: ignore[assignment]
    with suppress(ImportError):
        import_module("gguf")


if __name__ == "__main__":
    _import_libraries()
    if (own := _serve()) is not None:
        become_lora(own)
