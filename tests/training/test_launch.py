"""Distributed launch: exit codes, signals, a killed launcher, processes per machine, lost peers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.errors import LoraError
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
        if kind == "fails" and rank == "1":
            while len(open(file).read()) < 2: time.sleep(0.01)
            sys.exit(3)
        while kind == "hangs" or stop.signal is None: time.sleep(0.01)
        open(file, "a").write("s")
        sys.exit(stop.exit_code)
"""
LAUNCHER = f"""
import sys
from lora_cli.training import launch
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
    assert launch.launch_workers(2, [str(log), "stops"]) == code
    assert sorted(log.read_text()) == ["0", "1", "s", "s"]


def test_a_second_signal_ends_the_workers_at_once(log: Path, capfd: pytest.CaptureFixture[str]):
    def send() -> None:
        wait_until(log, 2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # the launcher passes the first one on
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert launch.launch_workers(2, [str(log), "hangs"]) == 130
    assert capfd.readouterr().err == "stopped by SIGTERM\n"  # said by one worker only


def test_a_worker_that_fails_ends_the_others(log: Path, capfd: pytest.CaptureFixture[str]):
    assert launch.launch_workers(2, [str(log), "fails"]) == 3
    assert capfd.readouterr().err == "process 1 ended with exit code 3\n"


def test_workers_that_end_well_give_exit_code_0(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "WORKER", (sys.executable, "-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"))
    assert launch.launch_workers(2, []) == 0


@pytest.mark.slow
def test_workers_stop_when_their_launcher_is_killed(log: Path):
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, str(log), "stops"]) as launcher:
        wait_until(log, 2)
        launcher.kill()
    wait_until(log, 4, seconds=20)


def test_the_local_world_size_counts_the_processes_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    accelerator: Any = SimpleNamespace(num_processes=16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.local_world_size(accelerator) == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launch.local_world_size(accelerator) == 16


HANGING_PEER = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from lora_cli.errors import LoraError
from lora_cli.training import launch
dist.init_process_group("gloo", timeout=launch.PREPARING_TIMEOUT)
if os.environ["RANK"] == "1":
    time.sleep(6)  # prepares alone
ones = torch.ones(1)
dist.all_reduce(ones)
launch.set_timeout(timedelta(seconds=2))
with launch.one_works_alone(timedelta(seconds=2)):
    if os.environ["RANK"] == "1":
        time.sleep(4)  # works alone
    dist.all_reduce(ones)
print("all answered", flush=True)
if os.environ["RANK"] == "1":
    time.sleep(60)
start = time.monotonic()
try:
    with launch.report_lost_peer():
        dist.all_reduce(ones)
except LoraError as error:
    print(error.message, time.monotonic() - start < 30, flush=True)
    os._exit(error.exit_code)
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_but_one_that_works_alone_does_not():
    store = launch.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING_PEER],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output, _ = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert output.splitlines() == [
        "all answered",
        "a process of this run has not answered within distributed.timeout_minutes True",
    ]
    assert processes[0].returncode == 1


def test_a_lost_peer_is_an_error_without_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(LoraError, match="another process of this run has ended"), launch.report_lost_peer():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:14766: Connection reset by peer.")
    with pytest.raises(RuntimeError, match="a bug"), launch.report_lost_peer():
        raise RuntimeError("a bug")
