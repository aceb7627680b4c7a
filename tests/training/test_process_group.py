"""The process group: timeouts, a hanging process, ports, processes per machine."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import worker
from lora_cli.training import process_group

WORKER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RECIPE = Recipe.model_validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}})


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the environment variables of a worker to these alone."""

    def set_variables(values: dict[str, str]) -> None:
        for name in (*worker.RENDEZVOUS, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_the_thread_that_watches_the_others_outlives_the_group():
    """At the end of a run the group is destroyed first; an error of the thread would be printed below the last line."""
    assert torch.distributed.group.WORLD is None
    assert process_group._collectives_begun() == 0


def test_a_port_in_use_is_one_error_with_a_hint(variables: Any):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        variables({**WORKER, "MASTER_PORT": str(port)})
        with pytest.raises(LoraError, match=f"^MASTER_PORT {port} of this machine is in use$") as raised:
            process_group.join_peers(RECIPE, torch.device("cpu"))
    assert "--master-port" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("rank", "address", "reason"),
    [
        ("1", "127.0.0.1", "Connection refused"),
        ("1", "name.invalid", "Name or service not known"),
        ("0", "name.invalid", "Name or service not known"),  # which has the store itself
    ],
)
def test_a_first_machine_that_does_not_answer_is_named(
    rank: str,
    address: str,
    reason: str,
    variables: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    variables({**WORKER, "RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": str(port)})
    monkeypatch.setattr(process_group, "timedelta", lambda **_: timedelta(seconds=0.1))
    with pytest.raises(LoraError) as raised:
        process_group.join_peers(RECIPE, torch.device("cpu"))
    told = f"the first machine of the run, {address}, does not answer on port {port}: {reason}"
    assert raised.value.message == told
    assert capfd.readouterr().err == ""  # of torch: a trace of C++ functions, and warnings


def test_a_program_that_is_no_store_is_told(variables: Any, monkeypatch: pytest.MonkeyPatch):
    """As where the first process has ended because its port was in use: torch waits for an answer without end."""
    ended = threading.Event()
    monkeypatch.setattr(process_group, "timedelta", lambda **_: timedelta(seconds=0.1))
    monkeypatch.setattr(process_group, "TCPStore", lambda *_, **__: ended.wait(60))
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables({**WORKER, "RANK": "1", "MASTER_PORT": str(server.getsockname()[1])})
        with pytest.raises(LoraError, match=r"does not answer on port \d+: another program has this port$"):
            process_group.join_peers(RECIPE, torch.device("cpu"))
    ended.set()


@pytest.mark.parametrize(
    ("sizes", "in_order", "found"),
    [
        ([2, 2, 1], True, "1 and 2 of them"),
        ([1, 1], True, "1 of them"),
        ([2, 2, 2, 2], False, "2 of them, whose ranks do not follow each other"),
    ],
)
def test_machines_that_cannot_each_share_a_base_are_refused(
    sizes: list[int], in_order: bool, found: str, monkeypatch: pytest.MonkeyPatch
):
    answers = iter([sizes, [True, in_order]])
    monkeypatch.setattr(process_group, "gather_object", lambda _: next(answers))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(sizes))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sizes[0]))
    with pytest.raises(LoraError, match=rf"^distributed\.strategy: hsdp shards .* machines have {found}$"):
        process_group.shard_mesh(torch.device("cpu"), of_machine=True)


def test_processes_that_do_not_know_their_machine_are_refused(monkeypatch: pytest.MonkeyPatch):
    """srun and mpirun set no LOCAL_WORLD_SIZE, and one machine of all processes would be fsdp over the network."""
    gathered = []

    def gather(values: list[Any]) -> list[Any]:
        gathered.append(values)
        return [*values, 2]

    monkeypatch.setattr(process_group, "gather_object", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(LoraError, match=r"hsdp .* LOCAL_WORLD_SIZE, .* is not set in 1 of 2 processes$") as raised:
        process_group.shard_mesh(torch.device("cpu"), of_machine=True)
    assert "set LOCAL_WORLD_SIZE to the number of processes on each machine" in str(raised.value.hint)
    # The other one, which knows it, takes part in the same operation, and ends with the same error.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "gather_object", lambda values: [0, *values])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(LoraError, match=r"is not set in 1 of 2 processes$"):
        process_group.shard_mesh(torch.device("cpu"), of_machine=True)


# Of two processes, the second one works alone for a while, which is allowed, and then does WHAT.
PAIR = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from lora_cli.recipe.schema import Recipe
from lora_cli.training import peers, process_group
from lora_cli.training.failures import report_failures
what, waits, torch_first = sys.argv[1], timedelta(seconds=int(sys.argv[2])), len(sys.argv) > 3
if torch_first:  # the group's own timeout is the first one
    peers.TICK_S, process_group.LATER = 99, timedelta(0)
recipe = Recipe.model_validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}})
second = os.environ["RANK"] == "1"
with report_failures(process_group.join_peers(recipe, torch.device("cpu"))):
    if second:
        time.sleep(3)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    process_group.set_timeout(waits)
    with process_group.one_works_alone(waits):
        if second:
            time.sleep(waits.total_seconds() + 3 if waits.total_seconds() < 5 else 0)
        dist.all_reduce(ones)
    os.write(1, b"all answered\\n")
    if second and what == "hangs":
        time.sleep(60)
    if second and what == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if second and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(ones)
"""


def run_pair(log: Path, *arguments: str) -> list[str]:
    """Run PAIR without a launcher, until its first process ends with exit code 1; return the lines of both."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | WORKER | {"MASTER_PORT": str(port)}
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR, *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in range(2)
        ]
        try:
            assert processes[0].wait(timeout=120) == 1
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [line for line in log.read_text().splitlines() if line.split(":")[0] in ("error", "hint", "all answered")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hangs", "2"], "process 1 (HOST) did not answer for 0:02 (distributed.timeout_minutes)"),
        (["stops", "2"], "process 1 (HOST) did not answer for 0:02 (distributed.timeout_minutes)"),
        (["hangs", "2", "torch first"], "a process of this run did not answer for distributed.timeout_minutes"),
        (["killed", "60"], "process 1 (HOST) ended"),
    ],
)
def test_a_process_that_is_lost_is_named_once_but_one_that_works_alone_is_not(
    arguments: list[str], message: str, tmp_path: Path
):
    start = time.monotonic()
    *answered, error, hint = run_pair(tmp_path / "log", *arguments)
    assert answered == ["all answered"] * 2
    assert error == f"error: {message.replace('HOST', socket.gethostname())}"
    assert hint.startswith("hint: see ")
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert time.monotonic() - start < 60
