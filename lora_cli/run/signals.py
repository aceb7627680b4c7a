"""Signal handling: SIGINT, SIGTERM and SIGHUP end the process without a trace of temporary files, or stop a loop first.

An exception in a signal handler would be raised wherever the program is: in an import, a destructor or between two
renames. Libraries drop it or report it as something else. Here, no exception is raised: a thread receives all signals,
also while the main thread waits in C code, and decides. Either the program notes the signal and stops soon, or the
thread removes temporary files and ends the process. This is as safe as SIGKILL, because results are written atomically.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from lora_cli.run.worker import is_first_of_machine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHED = "LORA_LAUNCHED"  # environment variable of a worker whose stdin is a pipe of its launcher
OF_TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable of a worker of torchrun
# Seconds in which torchrun passes on a signal that its worker has received too: Slurm sends signals to all processes.
ECHO_S = 1.0
LAUNCHER_LOST_S = 30  # seconds that such a worker has to save, after its launcher was killed

Receiver = Callable[[signal.Signals], bool]  # returns whether the process goes on

_receivers: list[Receiver] = []  # of the blocks that the main thread is in; the innermost one decides
_cleanups: list[Callable[[], None]] = []
_handled: list[signal.Signals] = []  # within `handle_signals`


class StopRequest:
    """A request to stop soon; `signal` is None until a signal arrives."""

    def __init__(self, accepted: tuple[signal.Signals, ...] = SIGNALS) -> None:
        self.signal: signal.Signals | None = None
        self._accepted = accepted
        self._received = 0.0  # when, by the monotonic clock

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP, 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    def is_set(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signal is not None

    def receive(self, number: signal.Signals) -> bool:
        """Note the first of the accepted signals, and return whether the process goes on."""
        if self.signal is not None or number not in self._accepted:
            is_echo = number == self.signal and time.monotonic() - self._received < ECHO_S
            return is_echo and OF_TORCHRUN in os.environ
        self.signal, self._received = number, time.monotonic()
        return True


@contextmanager
def stop_request(*accepted: signal.Signals) -> Iterator[StopRequest]:
    """Within the block, note the first signal of `accepted` (default: all three); any other ends the process."""
    request = StopRequest(accepted or SIGNALS)
    with receive_signals(request.receive):
        yield request


@contextmanager
def receive_signals(receiver: Receiver) -> Iterator[None]:
    """Within the block, call `receiver` with every signal, in another thread; if it returns False, the process ends."""
    with handle_signals():
        _receivers.append(receiver)
        try:
            yield
        finally:
            _receivers.remove(receiver)


@contextmanager
def at_end(cleanup: Callable[[], None]) -> Iterator[None]:
    """Call `cleanup` if a signal ends the process within the block; the main thread does nothing meanwhile."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Within the block, handle signals as this module describes; blocks can be nested. Call it in the main thread.

    Signals that the process ignores, as under `nohup` or with `&` in a script, stay ignored. Signals that were blocked
    by the process that started this one are delivered now.
    """
    if _handled:
        yield
        return
    _handled[:] = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # A byte for each signal after which the process goes on. A pipe, because a second signal interrupts the handler of
    # the first: it would wait for a lock of Python's that the first one holds.
    go_on, decide_end = os.pipe()

    def wait_for_decision(_: int, __: FrameType | None) -> None:
        """Stop the main thread, which must not use files while they are removed."""
        os.read(go_on, 1)

    thread = threading.Thread(target=_decide, args=(read_end, decide_end), name="signals", daemon=True)
    thread.start()
    # The interpreter writes each signal's number to the pipe at once; handlers have to wait for the main thread.
    previous_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    previous = {each: signal.signal(each, wait_for_decision) for each in _handled}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(previous_descriptor)
        os.close(write_end)
        thread.join()
        os.close(go_on)
        os.close(decide_end)
        _handled.clear()


_launched = threading.Event()


def is_launched() -> bool:
    """Return whether this process is a worker that `lora` has launched."""
    return _launched.is_set()


def stop_with_launcher() -> None:
    """In a worker, let the end of the launcher act as SIGTERM: nobody else would end the worker."""
    if os.environ.pop(LAUNCHED, None):  # the processes that it starts are no workers
        _launched.set()
        threading.Thread(target=_wait_for_launcher, name="launcher", daemon=True).start()


def _wait_for_launcher() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAUNCHER_LOST_S)
    os.kill(os.getpid(), signal.SIGTERM)  # another process of the run does not answer, so this one waits for it


def _decide(read_end: int, decide_end: int) -> None:
    """Read the numbers of signals until the pipe is closed, and decide what each one does."""
    with os.fdopen(read_end, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            if byte[0] not in SIGNALS:  # of a handler that a library has installed
                continue
            number = signal.Signals(byte[0])
            if not (_receivers and _receivers[-1](number)):
                _end_process(number)
            os.write(decide_end, b"\0")


def end_process(exit_code: int, lines: Sequence[str] = ()) -> NoReturn:
    """End the process from any thread: remove temporary files, write `lines` to stderr, exit."""
    try:
        for cleanup in reversed(_cleanups):
            with suppress(OSError):
                cleanup()
        with suppress(OSError):
            os.write(2, "".join(f"{line}\n" for line in lines).encode())
    finally:
        os._exit(exit_code)


def _end_process(number: signal.Signals) -> NoReturn:
    # Of several processes on a machine, the first one speaks.
    end_process(128 + number, [f"stopped by {number.name}"] if is_first_of_machine() else [])


def _block() -> None:
    if _handled:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    if _handled:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _reset_in_child() -> None:
    """Let signals end a forked child: it has no thread that decides, and would write to the pipe of its parent."""
    if _handled:
        signal.set_wakeup_fd(-1)
        for each in _handled:
            signal.signal(each, signal.SIG_DFL)
        _unblock()
        _handled.clear()
        _receivers.clear()
        _cleanups.clear()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset_in_child)
