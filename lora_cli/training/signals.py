"""Signal handling: the first SIGINT or SIGTERM stops training after the current step, the second kills the process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A request to stop training; `signal` is None until a signal arrives."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 without a signal."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def stop_after_step() -> Iterator[StopRequest]:
    """Within the block, record the first SIGINT or SIGTERM; a second one is handled as before the block."""
    stop_request = StopRequest()

    def record(number: int, _: FrameType | None) -> None:
        stop_request.signal = signal.Signals(number)
        restore_handlers()

    def restore_handlers() -> None:
        for each, handler in previous_handlers.items():
            signal.signal(each, handler)

    previous_handlers = {each: signal.signal(each, record) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_request
    finally:
        restore_handlers()
