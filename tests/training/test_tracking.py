"""Trackers never hold up a run: servers that refuse or do not answer, a killed tracker, a killed run."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_cli.run import hub, metrics_log
from lora_cli.run.metrics_log import MetricsLog
from lora_cli.training import tracking
from lora_cli.training.tracked_records import Pending, State, read_state, values_of
from lora_cli.training.tracking import Tracking
from tests.support import tracked
from tests.support.tracked_run import Run

ROOT = Path(__file__).parents[2]


def test_values_are_the_numbers_of_a_record():
    record = {"step": 3, "loss": 2.5, "tokens": 7, "grad_norm": None, "spike": {"mean": 1.0}, "skipped": True}
    assert values_of(record) == {"train/loss": 2.5, "train/tokens": 7}
    assert values_of({"step": 3, "eval_loss": 2.0, "eval_accuracy": 0.5}) == {"eval/loss": 2.0, "eval/accuracy": 0.5}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', '{"id": "a", "where": {}, "mark": [1]}', "null"])
def test_a_damaged_state_is_a_new_one(text: str, tmp_path: Path):
    (tmp_path / "state").write_text(text)
    assert read_state(tmp_path / "state") == State() == read_state(tmp_path / "missing")


def test_a_state_is_read_as_it_was_written(tmp_path: Path):
    state = State("id", {"project": "p"}, (57, 1))
    (tmp_path / "state").write_text(json.dumps(state.to_json()))
    assert read_state(tmp_path / "state") == state


def test_a_step_waits_for_its_evaluation_and_nothing_is_sent_twice(tmp_path: Path):
    pending = Pending(tmp_path / "m", (1, 0), lambda step: step % 2 == 0)
    with MetricsLog(tmp_path / "m") as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 1.0})
        pending.read()
        assert (pending.left, pending.next()) == ((1, 0), None)
        assert pending.next(whole=True) == {"step": 2, "loss": 1.0}
        log.write({"step": 2, "eval_loss": 1.0})
        pending.read()
    assert pending.next() == {"step": 2, "loss": 1.0}
    pending.remove()
    assert pending.next() == {"step": 2, "eval_loss": 1.0}
    pending.remove()
    metrics_log.truncate_after(tmp_path / "m", 1, info=lambda _: None)
    with MetricsLog(tmp_path / "m") as log:
        for step in (2, 3):
            log.write({"step": step, "loss": 2.0})
    pending.read()
    assert pending.next() == {"step": 3, "loss": 2.0}


def state(run: Run, name: str) -> State:
    return read_state(run.path / "tracking" / f"{name}.json")


def process_ids(trackers: Tracking) -> list[int]:
    return [each.process.pid for each in trackers._processes]


def test_a_hub_that_was_slow_for_the_model_does_not_keep_a_tracker_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(hub.BEFORE, "")  # so that it is removed afterwards
    monkeypatch.delenv(hub.BEFORE)
    monkeypatch.setenv("RANK", "0")
    hub._go_offline()
    code = (
        "import os, sys, time; from lora_cli.training.tracker_channel import Channel;"
        "channel = Channel(int(sys.argv[-1]));"
        "channel.report('ready', place=str([os.environ.get(n) for n in sys.argv[1:-1]]), resumed=False);"
        "time.sleep(60)"
    )
    monkeypatch.setattr(tracking, "PROGRAM", (sys.executable, "-c", code, "HF_HUB_OFFLINE", hub.BEFORE, "RANK"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = Run(tmp_path / "a")
    trackers = run.track(to=["tensorboard"])
    run.wait_for(trackers, lambda: bool(run.told))
    trackers._processes[0].kill()
    trackers.finish()
    assert run.told[0] == "tensorboard: tracked [None, None, None]"


@pytest.mark.slow
def test_servers_that_refuse_or_never_answer(tmp_path: Path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = silent.getsockname()[1], closed.getsockname()[1]
        closed.close()
        runs = [Run(tmp_path / name) for name in ("silent", "closed")]
        start = time.monotonic()
        trackers = [
            run.track(to=["mlflow"], server=f"http://127.0.0.1:{port}", timeout_seconds=limit)
            for run, port, limit in zip(runs, ports, (60, 1), strict=True)
        ]
        for run in runs:
            run.write(1, 2, 3)
        for each in trackers:
            each.poll()
        assert time.monotonic() - start < 1
        runs[1].wait_for(trackers[1], lambda: bool(runs[1].told))
        pids = process_ids(trackers[0]) + process_ids(trackers[1])
        for each in trackers:
            each.status = "finished"
            start = time.monotonic()
            if each is trackers[0]:  # a signal ends the waiting
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            each.finish()
            assert time.monotonic() - start < 3
    assert runs[0].told == [
        "warning: mlflow: 0 of 3 steps and 0 of 1 evaluation sent, 4 not sent: not ready when a signal came, and "
        f"ended; {tracking.LATER}"
    ]
    first, last = runs[1].told
    assert first.startswith("warning: mlflow: MlflowException: API request to")
    assert first.endswith("; the run goes on, and it is tried again")
    # Its last try may take longer than the time that is left.
    assert last.startswith("warning: mlflow: 0 of 3 steps and 0 of 1 evaluation sent, 4 not sent: ")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_a_killed_run_and_a_killed_tracker(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = Run(tmp_path / "a")
    run.write(1, 2, 3)
    program = (
        "import os, sys; from pathlib import Path; from tests.support.tracked_run import Run;"
        "run = Run(Path(sys.argv[1])); trackers = run.track(to=['tensorboard']);"
        "run.wait_for(trackers, lambda: bool(run.told)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(run.path)], cwd=ROOT, check=False).returncode == 9
    # The next start waits for the process of the first one, which sends what is left.
    metrics_log.truncate_after(run.path / "metrics.jsonl", 2, info=lambda _: None)
    again = run.track(done=2, to=["tensorboard"])
    run.write(3, 4)
    run.wait_for(again, lambda: "tensorboard: goes on" in str(run.told))
    assert run.told[-1].startswith("tensorboard: goes on in ")
    assert run.told[:-1] in (
        [],
        ["warning: tensorboard: it waits for its process of an earlier start; the run goes on"],
    )
    again.status = "finished"
    again.finish()
    assert run.told[-1] == "tensorboard: 2 steps and 1 evaluation sent"
    stored = tracked.tensorboard_run(run.path / "tracking" / "tensorboard")
    assert [step for step, _ in stored.points["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in stored.points["eval/loss"]] == [2, 4]
    assert "eval_every" in stored.config
    assert state(run, "tensorboard").mark == (4, 1)

    killed = run.track(done=4, to=["tensorboard"])
    (pid,) = process_ids(killed)
    os.kill(pid, signal.SIGKILL)
    run.wait_for(killed, lambda: "has ended" in run.told[-1])
    log = run.path / "tracking" / "tensorboard.log"
    assert run.told[-1] == f"warning: tensorboard: its process has ended (SIGKILL); the run goes on, see {log}"
    killed.status = "finished"
    killed.finish()
    assert run.told[-1].startswith(
        "warning: tensorboard: 0 steps and 0 evaluations sent: its process has ended (SIGKILL)"
    )
