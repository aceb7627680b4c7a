"""SIGINT and SIGTERM become a wish that the loop grants after the step in hand; the second one ends the process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal asked for the end, if any did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 if nobody asked."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def stop_after_step() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only fills the wish; a second one acts as it always does."""
    stop_request = StopRequest()

    def remember(number: int, _: FrameType | None) -> None:
        stop_request.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, remember) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
