"""Signals end a process at once, after its cleanup, or are noted first; no exception is raised in the main thread."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from lora_cli.run import signals
from lora_cli.run.signals import SIGNALS, handle_signals, stop_request

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.signal(number, own_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def own_handler(number: int, _: FrameType | None) -> None:
    pytest.fail(f"signal {number} outside of the block")


def run(body: str, sent: signal.Signals | None = None, *, ignored: signal.Signals | None = None) -> tuple[int, str]:
    """Run Python code with the module's names, send it a signal when it prints; return exit code and stderr."""
    code = (
        "import os, signal, time, threading\n"
        "from lora_cli.run.signals import *\n"
        "def say(): os.write(1, b'x')\n"
        "with handle_signals():\n"
    ) + "".join(f"    {line}\n" for line in body.splitlines())
    # A handler other than SIG_IGN would become the default in the new process.
    before = signal.signal(ignored, signal.SIG_IGN) if ignored else None
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if ignored:
            signal.signal(ignored, before)
        assert process.stdout is not None
        assert process.stderr is not None
        if sent is not None:
            process.stdout.read(1)
            process.send_signal(sent)
        return process.wait(timeout=60), process.stderr.read().decode()


@pytest.mark.parametrize(("sent", "code"), CODES)
def test_a_signal_ends_the_process_in_one_line_after_its_cleanup(sent: signal.Signals, code: int):
    body = "with at_end(lambda: os.write(2, b'cleaned\\n')):\n    say()\n    while True: pass"
    assert run(body, sent) == (code, f"cleaned\nstopped by {sent.name}\n")


def test_the_main_thread_does_nothing_while_the_process_is_cleaned():
    body = (
        "counts = []\n"
        "def clean():\n"
        "    time.sleep(0.01)\n"
        "    before = len(counts)\n"
        "    time.sleep(0.05)\n"
        "    os.write(2, b'idle\\n' if len(counts) == before else b'busy\\n')\n"
        "with at_end(clean):\n"
        "    say()\n"
        "    while True: counts.append(1)"
    )
    assert run(body, signal.SIGTERM) == (143, "idle\nstopped by SIGTERM\n")


def test_a_main_thread_that_waits_in_c_code_does_not_delay_the_end():
    # ctypes releases the GIL for the call; the C library's sleep is not interrupted for Python's handlers.
    body = "import ctypes\nsay()\nwhile True: ctypes.CDLL(None).sleep(600)"
    start = time.monotonic()
    assert run(body, signal.SIGTERM)[0] == 143
    assert time.monotonic() - start < 60


def test_an_error_of_the_cleanup_does_not_keep_the_process_alive():
    body = "def fail(): raise OSError('disk')\nwith at_end(fail):\n    say()\n    while True: pass"
    assert run(body, signal.SIGTERM) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored_and_sigterm_ends_the_process(number: signal.Signals):
    body = (
        "with stop_request() as stop:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    assert stop.signal is None\n"
        "say()\n"
        "while True: pass"
    )
    assert run(body, signal.SIGTERM, ignored=number) == (143, "stopped by SIGTERM\n")


def test_a_forked_child_is_ended_by_a_signal_and_its_parent_is_not():
    body = (
        "child = os.fork()\n"
        "if not child:\n"
        "    time.sleep(600)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM\n"
        "time.sleep(0.1)"
    )
    assert run(body) == (0, "")


def test_blocked_signals_are_delivered_when_they_can_be_handled():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        code = (
            "import time\ntime.sleep(0.2)\nfrom lora_cli.run.signals import *\nwith handle_signals(): time.sleep(600)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == "stopped by SIGINT\n"
            assert process.returncode == 130
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_handlers_are_restored_after_the_block():
    with handle_signals(), stop_request() as stop:
        assert own_handler not in [signal.getsignal(number) for number in SIGNALS]
    assert [signal.getsignal(number) for number in SIGNALS] == [own_handler] * 3
    assert (stop.signal, stop.exit_code) == (None, 0)


def test_the_handlers_are_restored_after_an_error():
    with pytest.raises(ValueError, match="a bug"), stop_request():
        raise ValueError("a bug")
    assert [signal.getsignal(number) for number in SIGNALS] == [own_handler] * 3


@pytest.mark.parametrize(("sent", "code"), CODES)
def test_the_first_signal_is_noted_at_once(sent: signal.Signals, code: int):
    with stop_request() as stop:
        os.kill(os.getpid(), sent)
        assert (stop.signal, stop.exit_code) == (sent, code)


def test_the_second_signal_and_one_that_is_not_accepted_end_the_process():
    body = "with stop_request() as stop:\n    os.kill(os.getpid(), 2)\n    say()\n    while True: pass"
    assert run(body, signal.SIGTERM) == (143, "stopped by SIGTERM\n")
    body = "with stop_request(signal.SIGINT) as stop:\n    say()\n    while True: pass"
    assert run(body, signal.SIGTERM) == (143, "stopped by SIGTERM\n")


def test_signals_that_interrupt_the_handler_of_another_signal_block_nothing():
    """As pressed twice: the second one arrives while the main thread waits for the decision on the first."""
    code = (
        "import os, sys, threading\n"
        "from lora_cli.run.signals import *\n"
        "received, ended = [], threading.Event()\n"
        "sys.setswitchinterval(1e-6)\n"
        "threading.Thread(target=lambda: (os.read(0, 1), ended.set()), daemon=True).start()\n"
        "threading.Thread(target=exec, args=('while True: pass',), daemon=True).start()\n"
        "with receive_signals(lambda number: received.append(number) or True):\n"
        "    os.write(1, b'x')\n"
        "    while not ended.is_set(): pass\n"
        "os.write(1, f'{len(received)}'.encode())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(1)
        for number in range(1500):
            process.send_signal(SIGNALS[number % len(SIGNALS)])
            time.sleep(0.0005)
        process.stdin.close()  # the end of the block: a signal behind it would end the process
        try:
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
        assert int(process.stdout.read()) > 3


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_torchruns_echo_of_a_signal_does_not_end_its_worker(under_torchrun: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(signals.OF_TORCHRUN, raising=False)
    if under_torchrun:
        monkeypatch.setenv(signals.OF_TORCHRUN, "run-1")
    request = signals.StopRequest()
    assert request.receive(signal.SIGTERM)
    assert request.receive(signal.SIGTERM) is under_torchrun
    assert not request.receive(signal.SIGINT)
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    assert not request.receive(signal.SIGTERM)
