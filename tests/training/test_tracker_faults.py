"""A run goes on whatever a tracker's library does: it closes files, forks, prints secrets, is killed, hangs, stops."""

import fcntl
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_cli.run.signals import handle_signals
from lora_cli.training import tracking
from lora_cli.training.tracker_log import LogWriter
from lora_cli.training.tracker_process import describe_failure
from lora_cli.training.tracking import Tracking
from tests.support import stub_tracker
from tests.support.tracked_run import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WANDB_API_KEY", stub_tracker.SECRETS[2])
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path / "a")


@contextmanager
def tracked(run: Run, stage: str, fault: str, *, pause: float = 0.0, **spec: Any) -> Iterator[Tracking]:
    """Track the first steps of a run with the stub, let it happen, and write two more steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "PROGRAM", (sys.executable, "-m", "tests.support.stub_tracker", stage, fault))
        trackers = run.track(to=["wandb"], **spec)
    run.write(1, 2)
    yield trackers
    run.write(3, 4)
    trackers.status = "finished"
    trackers.finish()


def stored_steps(run: Run) -> list[tuple[int, str]]:
    text = (run.path / "stored.txt").read_text() if (run.path / "stored.txt").exists() else ""
    return [
        (int(step), "eval" if "eval" in values else "train")
        for step, _, values in (line.partition(" ") for line in text.splitlines())
    ]


def is_locked(log: Path) -> bool:
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


ALL = [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval")]
COMPLETE = "wandb: 4 steps and 2 evaluations sent"


def sent(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "tracking" / "sent.json").read_text())["wandb"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("start", "close"),
        ("log", "close"),
        ("start", "close_all"),
        ("log", "close_all"),
        ("start", "stdin"),
        ("log", "daemon"),
        ("log", "much"),
        ("log", "children"),
    ],
)
def test_what_a_library_does_to_its_process_is_no_matter(stage: str, fault: str, run: Run):
    with tracked(run, stage, fault) as trackers:
        run.wait_for(trackers, lambda: stored_steps(run) == ALL[:3])
        if fault != "children":  # which kills the process that holds the lock
            assert is_locked(run.path / "tracking" / "wandb.log")
    assert run.told == ["wandb: tracked here", COMPLETE]
    assert stored_steps(run) == ALL
    assert sent(run)["complete"]
    assert (run.path / "tracking" / "wandb.log").stat().st_size < 9 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [("start", "kill"), ("log", "kill"), ("log", "fork"), ("start", "daemonise"), ("log", "signals")],
)
def test_a_tracker_that_has_ended_is_noticed_at_once_and_counted(stage: str, fault: str, run: Run):
    with tracked(run, stage, fault) as trackers:
        run.wait_for(trackers, lambda: "has ended" in str(run.told))
        start = time.monotonic()
    assert time.monotonic() - start < 5  # not the minute that a run waits for a tracker
    how = {"kill": "SIGKILL", "fork": "SIGKILL", "daemonise": "exit code 0", "signals": "signal 40"}[fault]
    assert run.told[stage == "log" :] == [
        f"warning: wandb: its process has ended ({how}); the run goes on, see {run.path}/tracking/wandb.log",
        "warning: wandb: 0 of 4 steps and 0 of 2 evaluations sent, 6 not sent: its process has ended "
        f"({how}); lora train RECIPE --resume sends them from metrics.jsonl",
    ]
    assert sent(run) | {"problem": None} == {
        "steps": 0,
        "evaluations": 0,
        "steps_left": 4,
        "evaluations_left": 2,
        "problem": None,
        "cut_off": True,
        "uploaded": None,
        "unreadable": [],
        "complete": False,
    }
    if fault in ("kill", "fork"):  # which still has the files of the first process
        with tracked(run, "log", "nothing"):
            pass
        assert stored_steps(run) == ALL


@pytest.mark.slow
def test_a_tracker_that_is_killed_at_the_end(run: Run):
    with tracked(run, "finish", "kill"):
        pass
    how = "its process has ended (SIGKILL)"
    assert run.told[1:] == [
        f"warning: wandb: {how}; the run goes on, see {run.path}/tracking/wandb.log",
        f"warning: {COMPLETE}, of which the last may be lost: {how}; see {run.path}/tracking",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fault"), [("log", "hang"), ("log", "stop"), ("finish", "hang")])
def test_a_tracker_that_hangs_or_is_stopped_neither_delays_a_step_nor_the_end(stage: str, fault: str, run: Run):
    limit = 3 if stage == "finish" else 1
    with tracked(run, stage, fault, timeout_seconds=limit) as trackers:
        run.wait_for(trackers, lambda: run.told == ["wandb: tracked here"])
        start = time.monotonic()
        for _ in range(1000):
            trackers.poll()
        assert time.monotonic() - start < 0.5
        start = time.monotonic()
    assert limit <= time.monotonic() - start < limit + 2
    problem = f"not ready after {limit} s, and ended"
    assert run.told[-1].startswith("warning: wandb: ")
    assert run.told[-1].endswith(
        f"4 steps and 2 evaluations sent, of which the last may be lost: {problem}; see {run.path}/tracking"
        if stage == "finish"
        else f"0 of 4 steps and 0 of 2 evaluations sent, 6 not sent: {problem}; {tracking.LATER}"
    )
    assert trackers._processes[0].process.returncode == -signal.SIGKILL


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Within the block, let this process have no descriptor from `limit` on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_cannot_be_started_is_told_and_counted(run: Run):
    with open_files(3):
        trackers = run.track(to=["wandb"])
    run.write(1)
    trackers.poll()
    trackers.status = "finished"
    trackers.finish()
    why = "its process cannot be started: Too many open files"
    line = f"warning: wandb: 0 of 1 step and 0 evaluations sent, 1 not sent: {why}; {tracking.LATER}"
    assert run.told == [f"warning: wandb: {why}; the run goes on without it", line]
    assert sent(run)["steps_left"] == 1
    with handle_signals(), open_files(3):  # not even the records can be counted
        trackers.finish()
    assert run.told[2:] == [
        f"warning: wandb: 0 steps and 0 evaluations sent: {why}; see {run.path}/tracking",
        "warning: tracking/sent.json cannot be written: Too many open files",
    ]


@pytest.mark.slow
def test_without_the_process_of_the_log_nothing_is_printed(run: Run, monkeypatch: pytest.MonkeyPatch):
    code = "import sys; sys.executable = '/missing'; from tests.support import stub_tracker; stub_tracker.main()"
    monkeypatch.setattr(tracking, "PROGRAM", (sys.executable, "-c", code, "log", "secrets"))
    trackers = run.track(to=["wandb"])
    run.write(1)
    run.wait_for(trackers, lambda: stored_steps(run) == ALL[:1])
    trackers.status = "finished"
    trackers.finish()
    assert run.told[0] == "warning: wandb: wandb.log cannot be written: No such file or directory; the run goes on"
    assert run.told[-1] == "wandb: 1 step and 0 evaluations sent"
    log = (run.path / "tracking" / "wandb.log").read_text()
    assert "ConnectionError: refused: https://host/x (not shown)" in log
    assert "GET" not in log


@pytest.mark.slow
def test_more_than_1024_open_files(run: Run):
    with open_files(2048):
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            with tracked(run, "log", "nothing") as trackers:
                run.wait_for(trackers, lambda: bool(run.told))
        finally:
            for each in opened:
                os.close(each)
    assert run.told == ["wandb: tracked here", COMPLETE]


@pytest.mark.slow
def test_secrets_reach_neither_terminal_nor_log(run: Run):
    with tracked(run, "log", "secrets") as trackers:
        run.wait_for(trackers, lambda: stored_steps(run) == ALL[:3])
    log = (run.path / "tracking" / "wandb.log").read_text()
    assert "GET http://host/path key (not shown)\n10 %\n20 %\n" in log
    assert "in a process: (not shown) wandb_api_key=(not shown)" in log
    assert "ConnectionError: refused: https://host/x (not shown)" in log
    assert run.told == [
        "wandb: tracked here",
        "warning: wandb: ConnectionError: refused: https://host/x (not shown); the run goes on, and it is tried again",
        COMPLETE,
    ]
    everything = log + str(run.told) + "".join(file.read_text() for file in run.path.rglob("*.json*"))
    assert [secret for secret in stub_tracker.SECRETS if secret in everything] == []


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_the_tracker_goes_on(run: Run):
    with tracked(run, "log", "disk", artifacts=True) as trackers:
        run.wait_for(trackers, lambda: trackers._processes[0].channel.sent == (2, 1))
    problem = "the files cannot be copied: No usable temporary directory"
    assert [line.partition(" found in ")[0] for line in run.told] == [
        "wandb: tracked here",
        f"warning: wandb: {problem}",
        "warning: wandb: wandb.json cannot be written: File too large; the run goes on",
        f"warning: {COMPLETE}; the files were not sent: {problem}",
    ]


@pytest.mark.slow
def test_too_many_open_files_are_told_once_and_the_tracker_goes_on(run: Run):
    with tracked(run, "start", "files") as trackers:
        run.wait_for(trackers, lambda: stored_steps(run) == ALL[:3])
    assert run.told == [
        "warning: wandb: wandb.json cannot be written: Too many open files; the run goes on",
        "wandb: tracked here",
        COMPLETE,
    ]
    assert json.loads((run.path / "tracking" / "wandb.json").read_text())["mark"] == [4, 1]


def test_lines_that_the_log_cannot_take_are_counted(tmp_path: Path):
    with open("/dev/full", "wb") as disk, open(tmp_path / "log", "wb") as file:
        log = LogWriter(disk.fileno(), limit=41)
        log.add(b"one\ntwo\nth")
        os.dup2(file.fileno(), disk.fileno())
        log.add(b"ree\r" + b"x" * 20_000 + b"\nfour five\nsix\nseven\neight\nnine")
        log.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        "(2 lines are left out)",
        "three",
        " [...]",
        "four five",
        "six",
        "seven",
        "(the rest is left out: it is too much)",
        "(2 lines are left out)",
    ]


@pytest.mark.slow
def test_files_that_are_missing_or_damaged_are_told_and_the_others_sent(run: Run):
    (run.path / "manifest.json").write_text("{")
    with tracked(run, "log", "nothing", artifacts=True):
        pass
    assert (run.path / "uploaded.txt").read_text() == "metrics.jsonl recipe.yaml"
    assert run.told[-1] == (
        f"warning: {COMPLETE}, with recipe.yaml, metrics.jsonl; "
        "not sent, as they are missing or damaged: README.md, manifest.json"
    )


@pytest.mark.slow
def test_a_library_that_cancels_is_tried_again(run: Run):
    with tracked(run, "log", "cancelled") as trackers:
        run.wait_for(trackers, lambda: stored_steps(run) == ALL[:3])
    assert run.told == [
        "wandb: tracked here",
        "warning: wandb: CancelledError: no message; the run goes on, and it is tried again",
        COMPLETE,
    ]


@pytest.mark.slow
def test_training_goes_first(run: Run):
    with tracked(run, "log", "nothing") as trackers:
        run.wait_for(trackers, lambda: bool(run.told))
        pid = trackers._processes[0].process.pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)


def test_a_pipe_in_the_place_of_a_log_or_state_is_not_waited_for(run: Run):
    os.mkfifo(run.path / "tracking" / "wandb.log")
    os.mkfifo(run.path / "tracking" / "wandb.json")
    with tracked(run, "log", "nothing"):
        pass
    assert run.told[0].startswith("warning: wandb: its process cannot be started: No such device")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise TypeError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(), "ValueError: no message"),
        (Unspeakable(), "Unspeakable: no message"),
        (ValueError("\x1b[1m first.\nsecond"), "ValueError: \\x1b[1m first"),
        (ValueError("x" * 190 + " " + stub_tracker.SECRETS[1]), f"ValueError: {'x' * 190} (not s..."),
    ],
)
def test_an_exception_is_one_line(error: Exception, expected: str):
    assert describe_failure(error) == expected
