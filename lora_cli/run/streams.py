"""Standard streams: lost messages on stderr end nothing, results that stdout does not take are an error. No torch.

A training run goes on when its terminal is closed or the disk of its log is full. Characters that the encoding of a
stream lacks are escaped (`\\xe9`).
"""

import errno
import io
import os
import selectors
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lora_cli.errors import LoraError

Failed = Callable[[OSError], None]


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block, replace `sys.stdout` and `sys.stderr`. Call it before other files are opened.

    A stream that was closed when the process started (`>&-`) would give its number to the next file that is opened,
    and messages of libraries would be written into that file.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        _open_null(0, os.O_RDONLY)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
    if sys.stdout is None:
        _open_null(1, os.O_RDONLY)  # such that writing is an error
    if sys.stderr is None:
        _open_null(2, os.O_WRONLY)
    # A stream of a test or of a program that calls this one stays, and so does that of a block around this one.
    if _is_original(sys.stdout, 1):
        sys.stdout = _text(1, sys.stdout, _report_stdout)
    if _is_original(sys.stderr, 2):
        sys.stderr = _text(2, sys.stderr, _ignore)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _is_original(stream: TextIO | None, descriptor: int) -> bool:
    if stream is None:
        return True
    try:
        return stream.fileno() == descriptor and not isinstance(stream.buffer, _Stream)
    except io.UnsupportedOperation:
        return False


def _open_null(descriptor: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _text(descriptor: int, before: TextIO | None, failed: Failed) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    raw = _Stream(descriptor, failed)
    # Unbuffered: what is left in a buffer after an error would be written, and fail, again when Python exits.
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True)


class _Stream(io.FileIO):
    """A file descriptor that is written without a buffer; errors are passed to a function."""

    def __init__(self, descriptor: int, failed: Failed) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = failed

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        rest = view
        while rest:
            try:
                rest = rest[os.write(self.fileno(), rest) :]
            except BlockingIOError:  # another program has made the shared pipe non-blocking
                with selectors.PollSelector() as pipe:
                    pipe.register(self.fileno(), selectors.EVENT_WRITE)
                    pipe.select()
            except OSError as error:
                self._failed(error)
                break
        return len(view)


def _ignore(_: OSError) -> None:
    pass


def _report_stdout(error: OSError) -> None:
    if error.errno == errno.EPIPE:  # the reader has seen enough (`| head`)
        raise SystemExit(1) from None
    raise LoraError(
        f"standard output cannot be written: {os.strerror(error.errno or 0)}",
        hint="redirect it to another file; other files that were written are complete",
        exit_code=1,
    ) from None
