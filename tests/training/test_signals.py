"""`stop_after_step` records the first signal, and gives the handlers back at the second signal and after the block."""

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from lora_cli.training.signals import stop_after_step

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OwnHandler(Exception):
    """Raised by the handlers that this process has before the block."""


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.signal(number, own_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def own_handler(number: int, _: FrameType | None) -> None:
    raise OwnHandler


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_the_handlers_are_restored_after_the_block():
    with stop_after_step() as request:
        assert own_handler not in handlers()
    assert handlers() == [own_handler, own_handler]
    assert (request.signal, request.exit_code) == (None, 0)


def test_the_handlers_are_restored_after_an_error():
    with pytest.raises(ValueError, match="a bug"), stop_after_step():
        raise ValueError("a bug")
    assert handlers() == [own_handler, own_handler]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_recorded_and_the_second_reaches_the_own_handler(sent: signal.Signals, code: int):
    with stop_after_step() as request:
        os.kill(os.getpid(), sent)
        assert (request.signal, request.exit_code) == (sent, code)
        assert handlers() == [own_handler, own_handler]
        with pytest.raises(OwnHandler):
            os.kill(os.getpid(), sent)
