"""OpenMP's threads spin for a few rounds, for fewer beside other work, unless the user has set how they wait."""

import os
import subprocess
import sys
import time

import pytest

from lora_cli.run import openmp
from lora_cli.run.openmp import BUSY, IDLE, WAITING, CpuTimes, limit_spinning, read_cpu_times, share_of_others

SCRIPT = """
from lora_cli.run.openmp import limit_spinning, read_cpu_times
limit_spinning(read_cpu_times())
import torch
torch.ones(2)
"""


@pytest.mark.parametrize("name", WAITING)
def test_the_users_setting_stays(name: str):
    environment = {name: "7"}
    limit_spinning(CpuTimes(0, 0, 0), environment)
    assert environment == {name: "7"}


@pytest.mark.parametrize(
    ("after", "share", "set_to"),
    [
        (CpuTimes(10.4, 5.3, 0.1), 0.0, IDLE),  # 0.4 s on two cores: 0.3 idle, 0.1 own
        (CpuTimes(10.4, 5.1, 0.1), 0.5, BUSY),
        (CpuTimes(10.4, 5.0, 0.4), 0.0, IDLE),  # all of it is this process
        (CpuTimes(10.0, 5.0, 0.0), 0.0, IDLE),  # too short to tell
        (CpuTimes(10.4, 5.4, 0.1), 0.0, IDLE),  # clocks of different steps
    ],
)
def test_other_work_is_the_time_that_is_neither_idle_nor_own(
    after: CpuTimes, share: float, set_to: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    before, environment = CpuTimes(10.0, 5.0, 0.0), {}
    assert share_of_others(before, after) == pytest.approx(share)
    monkeypatch.setattr(openmp, "read_cpu_times", lambda: after)
    limit_spinning(before, environment)
    assert environment == set_to


def test_without_times_the_machine_counts_as_idle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert read_cpu_times() is None
    environment: dict[str, str] = {}
    limit_spinning(None, environment)
    assert environment == IDLE


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_a_process_that_computes_is_seen_as_other_work():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = read_cpu_times()
        time.sleep(0.5)
        after = read_cpu_times()
    finally:
        busy.kill()
        busy.wait()
    assert before
    assert after
    cores = len(os.sched_getaffinity(0))
    assert after.all - before.all == pytest.approx(0.5 * cores, rel=0.3)
    assert share_of_others(before, after) > 0.5 / cores  # it has a core, or shares it with other tests


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with GNU's OpenMP on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("users", [None, "12345"])
def test_the_library_reads_it_when_torch_is_imported(users: str | None):
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **({"GOMP_SPINCOUNT": users} if users else {})}
    shown = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    expected = [users] if users else [IDLE["GOMP_SPINCOUNT"], BUSY["GOMP_SPINCOUNT"]]
    assert any(f"GOMP_SPINCOUNT = '{count}'" in shown.stderr for count in expected), shown.stderr
