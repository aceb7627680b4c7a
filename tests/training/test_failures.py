"""Failures of one of several processes: printed once with rank and machine; errors of gloo, NCCL and the store."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from lora_cli.errors import LoraError
from lora_cli.training import failures
from lora_cli.training.memory_ladder import Rung, StartAgain
from lora_cli.training.peers import Failure, Peers, RunError

# As torch 2.13 writes them, shortened.
REMOTE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:88, remote process exited or there was a \
network error, NCCL version 2.28.9
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketPollConnect: connect to 10.0.0.2<4711> returned Connection refused"""
SYSTEM = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, unhandled system error (run \
with NCCL_DEBUG=INFO for details), NCCL version 2.28.9
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)"""
WATCHDOG = """NCCL communicator was aborted on rank 0.  Original reason for failure was: [Rank 0] Watchdog caught \
collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, NumelIn=8192, NumelOut=8192, Timeout(ms)=600000) \
ran for 600081 milliseconds before timing out."""
UNIQUE_ID = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: {}"
)
HANGS = "a process of this run did not answer for distributed.timeout_minutes"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Peers:
    """A process of a run of two, without the other one's heartbeat."""
    monkeypatch.setattr(failures, "LAUNCHER_S", 0.0)
    monkeypatch.setattr(failures, "LINGER_S", 0.0)
    found = Peers(HashStore(), rank=0, world_size=2)
    found.hosts = found.host, "other"  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: reset by peer"),
            "process 1 (other) ended",
        ),
        (RuntimeError("[...unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"), HANGS),
        (dist.DistBackendError(REMOTE), "process 1 (other) ended"),
        (dist.DistBackendError(WATCHDOG), HANGS),
        (dist.DistBackendError(UNIQUE_ID.format("Socket Timeout")), HANGS),
        (dist.DistBackendError(UNIQUE_ID.format("Connection reset by peer")), "process 1 (other) ended"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "process 1 (other) ended"),
        (dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cpu//0/0"), HANGS),
        (
            dist.DistBackendError(SYSTEM),
            "the connection of the GPUs failed: ncclSystemError: System call (e.g. socket, malloc) or external library "
            "call failed or device error. Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)",
        ),
        (dist.DistBackendError("no device"), "the connection of the GPUs failed: no device"),
        (dist.DistBackendError(""), "the connection of the GPUs failed: it gives no reason"),
    ],
)
def test_an_error_of_the_group_is_one_line_with_a_hint(error: RuntimeError, message: str, peers: Peers):
    found = failures.describe_group_error(error, peers)
    assert found is not None
    assert (found.message, found.exit_code) == (message, 1)
    assert found.hint


def test_other_errors_keep_their_traceback(peers: Peers, capsys: pytest.CaptureFixture[str]):
    assert failures.describe_group_error(RuntimeError("a bug"), peers) is None
    with pytest.raises(RuntimeError, match="a bug"), failures.report_failures(peers):
        raise RuntimeError("a bug")
    assert capsys.readouterr().err == f"process 0 ({peers.host}) failed:\n"
    assert peers.failure() == Failure(0, f"process 0 ({peers.host}) failed: RuntimeError: a bug", None)


def test_the_same_traceback_is_printed_by_one_process_of_a_machine(peers: Peers, capsys: pytest.CaptureFixture[str]):
    assert peers.claim("KeyError: 'x'")  # by another process
    with pytest.raises(SystemExit) as raised, failures.report_failures(peers):
        raise KeyError("x")
    assert raised.value.code == 1
    assert capsys.readouterr().err == ""


def error_of(kind: str) -> Exception:
    if kind == "disk":
        return OSError(28, "No space left on device", "file")
    return LoraError("rows.jsonl does not exist", hint="check the path", exit_code=2)


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_that_asks_for_another_start_is_told_once(
    launched: bool, peers: Peers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if launched:
        monkeypatch.setattr(failures, "is_launched", lambda: True)
    text = "step 7 ran out of memory: every 2nd layer is recomputed from here on"
    for told in (True, False):  # another process of this machine has run out too
        with pytest.raises(SystemExit) as raised, failures.report_failures(peers):
            raise StartAgain("step 7", Rung(2))
        assert raised.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        if launched:  # the launcher starts them again, and it is no error
            assert lines == [f"process 0 ({peers.host}): {text}; all processes start again"] * told
        else:
            assert lines[:1] == [f"error: process 0 ({peers.host}): {text}"] * told
            assert len(lines) == 2 * told
    assert peers.wanted_form() == {"every": 2, "offload": False, "parts": 1}
    assert peers.failure() is not None


@pytest.mark.parametrize(("kind", "code", "text"), [("lora", 2, "rows.jsonl does not exist"), ("disk", 1, "file: No")])
def test_an_error_is_printed_once_with_rank_and_machine_and_told_to_the_others(
    kind: str, code: int, text: str, peers: Peers, capsys: pytest.CaptureFixture[str]
):
    for expected in (1, 0):  # another process of this machine has the same error
        with pytest.raises(SystemExit) as raised, failures.report_failures(peers):
            raise error_of(kind)
        assert raised.value.code == code
        err = capsys.readouterr().err
        assert err.count(f"error: process 0 ({peers.host}): {text}") == expected
        assert err.count("hint: ") == expected
    found = peers.failure()
    assert found is not None
    assert found.message.startswith(f"process 0 ({peers.host}) failed: {text}")


def test_the_failure_of_another_process_is_printed_where_its_own_message_is_not(
    peers: Peers, capsys: pytest.CaptureFixture[str]
):
    peers.record_failure(Failure(1, "process 1 (other) failed: no rows", "copy them"))
    with pytest.raises(SystemExit) as raised, failures.report_failures(peers):
        raise dist.DistBackendError(REMOTE)
    assert raised.value.code == 1
    assert capsys.readouterr().err == "error: process 1 (other) failed: no rows\nhint: copy them\n"


def test_an_error_about_another_process_is_printed_as_it_is(peers: Peers, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised, failures.report_failures(peers):
        raise RunError("process 1 (other) has other rows", hint="copy them")
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: process 1 (other) has other rows\nhint: copy them\n"
    assert peers.failure() is None


@pytest.mark.parametrize("value", [None, "peers"])
def test_a_block_without_an_error_and_a_run_of_one_process_are_left_alone(value: Any, peers: Peers):
    with failures.report_failures(peers if value else None):
        pass
    with pytest.raises(LoraError), failures.report_failures(None):
        raise LoraError("mistake")
