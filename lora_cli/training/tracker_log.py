"""The process that writes the log of a tracker: what its libraries print, without secrets, up to a size.

A process of its own, and no thread: a library that prints from C holds Python's lock, and would wait for the thread for
ever. It has no libraries that could close its files, so it also holds the lock of the run and tracker: processes that a
tracker leaves behind do not have it. `tracker_process.py` starts it. No torch.
"""

import fcntl
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lora_cli.run.redact import redact_secrets

MAX_BYTES = 8 << 20  # of the log of one start
MAX_LINE = 8 << 10  # bytes
POLL_S = 0.1  # seconds between two looks whether the tracker has ended: what it leaves behind may keep the pipe open
PIPE_BYTES = 1 << 20  # more than a pipe holds


class LogWriter:
    """Writes lines to a descriptor without secrets; lines that do not fit, or cannot be written, are counted."""

    def __init__(self, descriptor: int, limit: int = MAX_BYTES) -> None:
        self._descriptor, self._left = descriptor, limit
        self._rest = b""  # the beginning of a line
        self._lost = 0

    def add(self, data: bytes) -> None:
        """Write the complete lines of what was printed; a bar that is drawn again is a line each time."""
        *lines, rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._write_line(line)
        self._rest = rest[: MAX_LINE + 1]

    def close(self) -> None:
        """Write what is left."""
        if self._rest:
            self._write_line(self._rest)
        if self._lost:
            self._write(b"")

    def _write_line(self, line: bytes) -> None:
        if self._left <= 0:
            self._lost += 1
            return
        if len(line) > MAX_LINE:  # without its last word, which can be the first half of a secret
            line = line[:MAX_LINE].rpartition(b" ")[0] + b" [...]"
        text = redact_secrets(line.decode(errors="replace")).encode(errors="replace") + b"\n"
        self._left -= len(text)
        if self._left <= 0:
            text += b"(the rest is left out: it is too much)\n"
        self._write(text)

    def _write(self, text: bytes) -> None:
        before = f"({self._lost:,} lines are left out)\n".encode() if self._lost else b""
        rest = before + text
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:  # the disk is full, perhaps not for long
            self._lost += text != b""
        else:
            self._lost = 0


def start_log(log: Path, on_wait: Callable[[], None]) -> None:
    """Let what this process prints go to a new process, which writes it to `log`.

    Wait for the process of an earlier start that still has the log, after a call of `on_wait`.

    Raises:
        OSError: the log cannot be opened, or the process cannot be started.
    """
    with open(log, "ab", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        program = (sys.executable, "-P", "-m", "lora_cli.training.tracker_log", str(os.getpid()))
        writer = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=file, stderr=file)
    assert writer.stdin is not None
    with writer.stdin as pipe:
        os.dup2(pipe.fileno(), 1)
        os.dup2(pipe.fileno(), 2)
    threading.Thread(target=_outlive, args=(writer, os.fstat(1)), daemon=True).start()


def _outlive(writer: "subprocess.Popen[bytes]", pipe: os.stat_result) -> None:
    """Let nothing that is printed fail when the log's process is killed."""
    writer.wait()
    with suppress(OSError):
        if os.path.samestat(os.fstat(1), pipe):
            drop_output()


def drop_output() -> None:
    """Let what this process prints go where its stdin comes from, which is nowhere."""
    os.dup2(0, 1)
    os.dup2(0, 2)


def main() -> None:
    """Write what comes from stdin to stdout, the log, until the process ends that has started this one."""
    parent, log = int(sys.argv[1]), LogWriter(1)
    os.set_blocking(0, False)
    with selectors.PollSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while os.getppid() == parent:
            if not selector.select(POLL_S):
                continue
            if data := os.read(0, PIPE_BYTES):
                log.add(data)
            else:  # its libraries have closed what they print to; the lock stays
                time.sleep(POLL_S)
    with suppress(BlockingIOError):  # what it has printed last
        log.add(os.read(0, PIPE_BYTES))
    log.close()


if __name__ == "__main__":
    main()
