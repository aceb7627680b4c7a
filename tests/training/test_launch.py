"""Distributed launch: exit codes after a signal, processes per machine, lost peers."""

import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from lora_cli.errors import LoraError
from lora_cli.training import launch


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_gives_the_exit_code_of_one_process(sent: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch):
    def run_until_signal(options: Any) -> None:
        assert options.shutdown_timeout == launch.SHUTDOWN_TIMEOUT_S
        raise SignalException("", sent)

    monkeypatch.setattr(launch, "run", run_until_signal)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch_workers(2, ["train", "recipe.yaml"]) == code


def test_the_local_world_size_counts_the_processes_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    accelerator: Any = SimpleNamespace(num_processes=16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.local_world_size(accelerator) == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launch.local_world_size(accelerator) == 16


def test_a_lost_peer_is_an_error_without_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(LoraError, match="another process of this run has ended"), launch.report_lost_peer():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:14766: Connection reset by peer.")
    with pytest.raises(RuntimeError, match="a bug"), launch.report_lost_peer():
        raise RuntimeError("a bug")
