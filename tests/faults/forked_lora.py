"""Run `lora` commands as processes within milliseconds: forks of a process that has imported the libraries.

The process that is forked must have no threads: it calls `import_libraries`, and runs nothing itself.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lora_cli.run.library_warnings import silence_library_warnings

# Modules that the commands import, of lora_cli and of libraries; those of an extra may be missing.
MODULES = (
    "lora_cli.cli", "lora_cli.commands.adapter", "lora_cli.commands.cache", "lora_cli.commands.chat",
    "lora_cli.commands.check", "lora_cli.commands.evaluate", "lora_cli.commands.export", "lora_cli.commands.merge",
    "lora_cli.commands.train", "lora_cli.export.gguf.model", "lora_cli.export.hf.model",
    "lora_cli.export.ollama.model", "lora_cli.export.onnx.model", "transformers.models.llama.modeling_llama", "pandas",
    "pyarrow.compute", "pyarrow.dataset", "gguf", "onnx", "onnxscript", "torch.onnx",
)  # fmt: skip
SECONDS = 90.0  # of one command; all take a few seconds
BLOCK = 1 << 16


class Ended(NamedTuple):
    """The end of a command."""

    code: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float  # since its start

    @property
    def last_lines(self) -> str:
        """The last two lines of stderr, `error:` and `hint:` if the command failed."""
        return " / ".join(self.err.splitlines()[-2:])

    @property
    def traceback(self) -> str:
        """The exception and where in lora_cli it came from, if one passed; also in a process that this one started."""
        _, begin, rest = self.err.rpartition("Traceback (most recent call last)")
        lines = [line.strip() for line in rest.splitlines()]
        frames = [line for line in lines if line.startswith("File ") and "lora_cli" in line]
        return (
            "\n".join([*frames[-2:], next((line for line in reversed(lines) if "Error" in line), lines[-1])])
            if begin
            else ""
        )

    @property
    def is_told(self) -> bool:
        """Whether the last two lines are one error and one hint, and the exit code fits.

        Several problems of a recipe are a line each, with what to do, before the error.
        """
        lines = self.err.splitlines()
        told = len(lines) >= 2 and lines[-2].startswith("error: ") and lines[-1].startswith("hint: ")
        told |= len(lines) >= 3 and lines[-1].startswith("error: ") and " problems in " in lines[-1]
        return told and self.code in (1, 2)


class Stream(NamedTuple):
    """What a command has written to stdout or stderr: a pipe, as limits on file sizes do not count there."""

    pipe: int  # its reading end, which does not block
    data: bytearray  # that was read from it

    def text(self) -> str:
        """Return all that has been written so far."""
        with suppress(BlockingIOError):
            while block := os.read(self.pipe, BLOCK):
                self.data.extend(block)
        return self.data.decode(errors="replace")


class Started(NamedTuple):
    """A running command."""

    pid: int
    out: Stream
    err: Stream
    begin: float  # of time.monotonic


def import_libraries() -> None:
    """Import what the commands import, without starting a thread."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    silence_library_warnings()
    for name in MODULES:
        with suppress(ModuleNotFoundError):
            import_module(name)
    import torch

    torch.set_num_threads(1)
    # As on a machine with one core, so that sums are rounded in the same way in every process.
    os.sched_getaffinity = lambda _: {0}  # type: ignore[assignment]


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    standard_input: str = "",
) -> Started:
    """Start `lora ARGUMENTS` in the working folder `folder`.

    Args:
        arguments: of the command line.
        folder: the working folder.
        environment: variables in addition to those of this process.
        before: called in the new process before the command.
        standard_input: text that the command reads, at most some kilobytes.
    """
    pipes = [os.pipe() for _ in range(3)]
    os.write(pipes[0][1], standard_input.encode())
    os.close(pipes[0][1])
    pid = os.fork()
    if pid == 0:
        try:
            _become_lora(arguments, folder, [pipes[0][0], pipes[1][1], pipes[2][1]], environment or {}, before)
        except BaseException:  # noqa: BLE001 - nothing may reach the frames of the parent
            os.write(2, traceback.format_exc().encode())
        os._exit(70)
    for descriptor in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(descriptor)
    for reading, _ in pipes[1:]:
        os.set_blocking(reading, False)
    return Started(pid, *(Stream(reading, bytearray()) for reading, _ in pipes[1:]), time.monotonic())


def _become_lora(
    arguments: Sequence[str],
    folder: Path,
    streams: Sequence[int],
    environment: Mapping[str, str],
    before: Callable[[], None] | None,
) -> None:
    from lora_cli.__main__ import main

    os.chdir(folder)
    os.environ.update(environment)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = ["lora", *map(str, arguments)]
    code: object = 0
    try:
        if before is not None:
            before()
        main()
    except SystemExit as request:
        code = request.code or 0
    except BaseException:  # noqa: BLE001 - as the interpreter does: the traceback, and exit code 1
        sys.stderr.write(traceback.format_exc())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def poll(running: Started) -> int | None:
    """Return the exit code of a command; None while it runs. Call it no more once it has returned a code."""
    for stream in (running.out, running.err):
        stream.text()  # so that no pipe gets full
    pid, status = os.waitpid(running.pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def wait(running: Started, *, seconds: float = SECONDS) -> Ended:
    """Wait for the end of a command.

    Raises:
        TimeoutError: it still runs after `seconds`; it is killed.
    """
    end, pause = time.monotonic() + seconds, 0.001
    while (code := poll(running)) is None:
        if time.monotonic() > end:
            os.kill(running.pid, signal.SIGKILL)
            os.waitpid(running.pid, 0)
            raise TimeoutError(finish(running, -signal.SIGKILL).err[-1000:])
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    return finish(running, code)


def finish(running: Started, code: int) -> Ended:
    """Return the end of a command whose exit code `poll` has returned, and close its streams."""
    texts = [stream.text() for stream in (running.out, running.err)]
    for stream in (running.out, running.err):
        os.close(stream.pipe)
    return Ended(code, *texts, time.monotonic() - running.begin)


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    standard_input: str = "",
    seconds: float = SECONDS,
) -> Ended:
    """Run `lora ARGUMENTS` in `folder` and wait for its end, see `start` and `wait`."""
    started = start(arguments, folder, environment=environment, before=before, standard_input=standard_input)
    return wait(started, seconds=seconds)
