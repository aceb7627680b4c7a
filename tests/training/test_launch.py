"""Launching workers on one machine: exit codes, signals, a killed launcher, restarts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DistributedSpec
from lora_cli.run.worker import RENDEZVOUS
from lora_cli.training import launch

# A worker as launch.py starts it, without torch. It appends its rank to a file when it can receive signals.
WORKER = """
import os, sys, time
from lora_cli.run.signals import handle_signals, stop_request, stop_with_launcher
rank, file, kind = os.environ["RANK"], sys.argv[1], sys.argv[2]
with handle_signals():
    stop_with_launcher()
    with stop_request() as stop:
        open(file, "a").write(rank)
        if kind.isdigit() and rank == "1":  # fails
            while len(open(file).read()) < 2: time.sleep(0.01)
            sys.exit(int(kind))
        if kind == "killed" and rank == "1":
            while len(open(file).read()) < 2: time.sleep(0.01)
            os.kill(os.getpid(), 9)
        while kind == "hangs" or stop.signal is None: time.sleep(0.01)
        open(file, "a").write("s")
        sys.exit(stop.exit_code)
"""
LAUNCHER = f"""
import sys
from lora_cli.training import launch, process_group
launch.WORKER = (sys.executable, "-c", {WORKER!r})
launch.launch_workers(2, sys.argv[1:])
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the two workers write to."""
    monkeypatch.setattr(launch, "WORKER", (sys.executable, "-c", WORKER))
    (tmp_path / "log").touch()
    return tmp_path / "log"


def wait_until(log: Path, length: int, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while len(log.read_text()) < length:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_passed_on_and_gives_the_exit_code_of_one_process(sent: signal.Signals, code: int, log: Path):
    def send() -> None:
        wait_until(log, 2)
        os.kill(os.getpid(), sent)

    threading.Thread(target=send).start()
    assert launch.launch_workers(2, [str(log), "stops"]).exit_code == code
    assert sorted(log.read_text()) == ["0", "1", "s", "s"]


def test_a_second_signal_ends_the_workers_at_once(log: Path, capfd: pytest.CaptureFixture[str]):
    def send() -> None:
        wait_until(log, 2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # the launcher passes the first one on
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert launch.launch_workers(2, [str(log), "hangs"]).exit_code == 130
    assert capfd.readouterr().err == "stopped by SIGTERM\n"  # said by one worker only


@pytest.mark.parametrize(("code", "how"), [(3, "ended with exit code 3"), (143, "was stopped by SIGTERM")])
def test_a_worker_that_fails_ends_the_others_and_is_named_with_its_machine(
    code: int, how: str, log: Path, capfd: pytest.CaptureFixture[str]
):
    assert launch.launch_workers(2, [str(log), str(code)]).exit_code == code
    assert capfd.readouterr().err == f"error: process 1 ({socket.gethostname()}) {how}\n"


def test_a_worker_that_has_printed_its_error_is_not_reported_again(log: Path, capfd: pytest.CaptureFixture[str]):
    assert launch.launch_workers(2, [str(log), "2"]).exit_code == 2
    assert capfd.readouterr().err == ""


def test_a_worker_that_a_signal_has_ended_is_reported_with_a_hint(log: Path, capfd: pytest.CaptureFixture[str]):
    assert launch.launch_workers(2, [str(log), "killed"]).exit_code == 137
    error, hint = capfd.readouterr().err.splitlines()
    assert error == f"error: process 1 ({socket.gethostname()}) was ended by SIGKILL"
    assert "out of memory" in hint


def test_workers_that_end_well_give_exit_code_0(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "WORKER", (sys.executable, "-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"))
    assert launch.launch_workers(2, []).exit_code == 0


# A worker that fails until it was started as often as its third argument says.
FAILING = """
import os, sys
file, code, starts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
open(file, "a").write("resumes " if "--resume" in sys.argv else "starts ")
sys.exit(code if len(open(file).read().split()) < starts else 0)
"""


@pytest.mark.parametrize(
    ("code", "starts", "max_restarts", "expected", "log_text"),
    [
        (3, 1, 2, 0, "starts"),  # it does not fail
        (3, 2, 2, 0, "starts resumes"),
        (1, 3, 2, 0, "starts resumes resumes"),
        (3, 9, 2, 3, "starts resumes resumes"),  # too often
        (3, 9, 0, 3, "starts"),
        (2, 9, 2, 2, "starts"),  # an error of the recipe
        (143, 9, 2, 143, "starts"),  # somebody has ended the worker
    ],
)
def test_workers_are_started_again_as_often_as_requested(
    code: int,
    starts: int,
    max_restarts: int,
    expected: int,
    log_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(launch, "WORKER", (sys.executable, "-c", FAILING))
    arguments = [str(tmp_path / "log"), str(code), str(starts)]
    ended = launch.launch_with_restarts(
        1, arguments, max_restarts=max_restarts, resume_arguments=lambda: [*arguments, "--resume"]
    )
    assert ended == expected
    assert (tmp_path / "log").read_text().split() == log_text.split()
    told = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert told == [
        f"starting the process again, from the newest checkpoint: restart {number} of {max_restarts}"
        for number in range(1, len(log_text.split()))
    ]


def test_a_start_that_a_worker_asks_for_takes_its_form_and_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    first, second = {"every": 4}, {"every": 2}
    died = launch.Outcome(137)
    outcomes = [launch.Outcome(1, form=first), died, launch.Outcome(1, form=second), died, died]
    starts = []

    def start(_: int, arguments: list[str], *, form: dict[str, Any] | None) -> launch.Outcome:
        starts.append((arguments, form))
        return outcomes[len(starts) - 1]

    monkeypatch.setattr(launch, "launch_workers", start)
    ended = launch.launch_with_restarts(2, ["train"], max_restarts=2, resume_arguments=lambda: ["train", "--resume"])
    assert ended == 137
    resumed = ["train", "--resume"]
    assert starts == [(["train"], None), (resumed, first), (resumed, first), (resumed, second), (resumed, second)]
    assert len(capfd.readouterr().err.splitlines()) == 2  # of the starts that count
    starts.clear()
    outcomes[0] = launch.Outcome(130, stopped=True, form=first)
    assert launch.launch_with_restarts(2, ["train"], max_restarts=2, resume_arguments=lambda: resumed) == 130
    assert len(starts) == 1


def test_a_worker_that_fails_in_the_form_that_it_got_asks_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The store has the form from the start: taken for a wish, it would start the workers again without end."""
    monkeypatch.setattr(launch, "WORKER", (sys.executable, "-c", FAILING))
    arguments = [str(tmp_path / "log"), "1", "9"]
    assert launch.launch_workers(2, arguments, form={"every": 4}) == launch.Outcome(1, form=None)


def test_a_signal_to_the_launcher_is_not_followed_by_a_restart(log: Path):
    def send() -> None:
        wait_until(log, 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    ended = launch.launch_with_restarts(
        2, [str(log), "stops"], max_restarts=3, resume_arguments=lambda: pytest.fail("started again")
    )
    assert ended == 130


@pytest.mark.parametrize(("wanted", "most"), [(1, 1), (3, 3), (4, None)])
def test_processes_that_host_memory_has_no_room_for_are_refused(
    wanted: int, most: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Each of them takes its libraries, and a typing error would start thousands."""
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launch, "available_memory", lambda _: 4 * launch.PROCESS_BYTES - 1)
    spec = DistributedSpec(processes=wanted)
    if most is not None:
        assert launch.resolve_processes(spec) == most
        return
    message = r"^distributed.processes: 4 processes take 2.7 GiB .* and 2.7 GiB is free$"
    with pytest.raises(LoraError, match=message) as told:
        launch.resolve_processes(spec)
    assert told.value.hint == "write at most 3"


def test_the_only_worker_of_a_run_joins_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = "', '".join(RENDEZVOUS)
    monkeypatch.setattr(
        launch, "WORKER", (sys.executable, "-c", f"import os; assert not {{'{names}'}} & {{*os.environ}}")
    )
    assert launch.launch_workers(1, []).exit_code == 0


@pytest.mark.slow
def test_workers_stop_when_their_launcher_is_killed(log: Path):
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, str(log), "stops"]) as launcher:
        wait_until(log, 2)
        launcher.kill()
    wait_until(log, 4, seconds=20)
