"""Processes of a run join, wait for each other, and name those that are lost or hang. Threads stand for processes."""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lora_cli.errors import LoraError
from lora_cli.training import peers as module
from lora_cli.training.peers import Failure, LostPeer, Peers

LONG = timedelta(seconds=30)


@pytest.fixture
def connect() -> Callable[[], TCPStore]:
    """Return a function that connects to one store."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


Connect = Callable[[], TCPStore]


def joined(connect: Connect, size: int = 3, hosts: str = "abb") -> list[Peers]:
    """Return the processes of a run that has started, process 0 on machine a, and so on."""
    peers = [Peers(connect(), rank=rank, world_size=size) for rank in range(size)]
    for each, host in zip(peers, hosts, strict=True):
        each.host = host
    together([lambda each=each: each.join({"of": each.rank}, timeout=LONG) for each in peers])
    return peers


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Return what functions return that wait for each other."""
    results: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        results[at] = calls[at]()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_all_processes_know_the_records_and_machines_of_all(connect: Connect):
    peers = [Peers(connect(), rank=rank, world_size=3) for rank in range(3)]
    records = together([lambda each=each: each.join({"of": each.rank}, timeout=LONG) for each in peers])
    assert records == [[{"of": 0}, {"of": 1}, {"of": 2}]] * 3
    assert all(each.hosts == [each.host] * 3 for each in peers)
    assert len({each.start for each in peers}) == 1


def test_a_second_start_with_the_same_store_takes_nothing_from_the_first(connect: Connect):
    """As after a restart by torchrun, whose store lasts; a process that starts early must not join the first start."""
    first = joined(connect)
    first[0].record_failure(Failure(0, "failed", None))
    second = [Peers(connect(), rank=rank, world_size=3) for rank in range(3)]

    def join(each: Peers) -> list[dict[str, Any]]:
        time.sleep(0.3 if each.rank == 0 else 0)
        return each.join({"of": each.rank + 10}, timeout=LONG)

    records = together([lambda each=each: join(each) for each in second])
    assert records == [[{"of": 10}, {"of": 11}, {"of": 12}]] * 3
    assert second[1].start == second[0].start != first[0].start
    assert second[1].failure() is None
    assert not second[2].has_begun()
    first[0].mark_begun()
    deadline = time.monotonic() + 10
    while not second[2].has_begun():  # a store does not confirm what it is told
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("rank", "missing"), [(0, "processes 1, 2"), (1, "process 0")])
def test_processes_that_do_not_join_are_named(rank: int, missing: str, connect: Connect):
    with pytest.raises(LoraError, match=f"^{missing} of 3 did not join the run within 0:00$") as raised:
        Peers(connect(), rank=rank, world_size=3).join({}, timeout=timedelta(seconds=0.2))
    assert raised.value.exit_code == 1


def test_ranks_are_named_with_their_machines(connect: Connect):
    peer = joined(connect)[0]
    assert peer.name(1) == "process 1 (b)"
    assert peer.names([2]) == "process 2 (b)"
    assert peer.names([0, 1, 2]) == "processes 0 (a) and 1, 2 (b)"


def test_values_are_exchanged_in_the_order_of_ranks(connect: Connect):
    peers = joined(connect)
    values = together([lambda each=each: each.exchange("key", each.rank * 2) for each in peers])
    assert values == [[0, 2, 4]] * 3


def test_an_exchange_ends_when_a_process_has_failed(connect: Connect):
    peers = joined(connect)
    peers[2].record_failure(Failure(2, "process 2 (b) failed: no rows", "hint"))
    with pytest.raises(LostPeer, match="no rows"):
        peers[0].exchange("key", 1)


def test_one_process_of_a_machine_prints_a_text(connect: Connect):
    first, second, third = joined(connect)
    assert [each.claim("text") for each in (second, third, first)] == [True, False, True]
    assert third.claim("another text")


def test_the_first_failure_counts_and_is_not_repeated_on_its_machine(connect: Connect):
    peers = joined(connect)
    peers[2].record_failure(Failure(2, "process 2 (b) failed: no rows", "hint"))
    peers[0].record_failure(Failure(0, "another", None))
    losses = [each.describe_loss(wait_s=0) for each in peers[:2]]
    assert [loss.message for loss in losses] == ["process 2 (b) failed: no rows"] * 2
    assert [loss.reported_here for loss in losses] == [False, True]
    lines = [peer.lines_after(loss) for peer, loss in zip(peers, losses, strict=False)]
    assert lines == [["error: process 2 (b) failed: no rows", "hint: hint"], []]


def test_a_process_without_heartbeat_is_named_after_a_closed_connection(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "TICK_S", 0.02)
    peers = joined(connect)
    for each in peers[:2]:
        each.watch(lambda: 0, lambda: LONG)
    peers[2].watch(lambda: 0, lambda: LONG)
    peers[2].leave()  # as if it was killed
    try:
        losses = together([lambda each=each: each.describe_loss(wait_s=0.5) for each in peers[:2]])
    finally:
        for each in peers:
            each.leave()
    assert {loss.message for loss in losses} == {"process 2 (b) ended"}


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ([9, 7, 6], "process 2 (b) did not answer for 0:00 (distributed.timeout_minutes)"),  # for which 1 waits
        ([7, 7, 6], "process 2 (b) did not answer for 0:00 (distributed.timeout_minutes)"),
        ([6, 7, 6], "processes 0 (a) and 2 (b) did not answer for 0:00 (distributed.timeout_minutes)"),
    ],
)
def test_processes_that_do_not_come_to_a_collective_are_named_by_all_others(
    counts: list[int], named: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    printed: dict[str, list[str]] = {}

    def end(code: int, lines: list[str]) -> None:
        printed.setdefault(threading.current_thread().name, []).extend([str(code), *lines])
        raise SystemExit  # of the thread

    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(module, "FAILURE_GRACE_S", 0.1)
    monkeypatch.setattr(module, "end_process", end)
    peers = joined(connect)
    for each, count in zip(peers, counts, strict=True):
        each.watch(lambda count=count: count, lambda: timedelta(seconds=0.2))
    deadline = time.monotonic() + 20
    while sum(map(len, printed.values())) < 7:  # three codes, and two lines on each of two machines
        assert time.monotonic() < deadline, printed
        time.sleep(0.02)
    lines = [line for each in printed.values() for line in each]
    assert lines.count(f"error: {named}") == 2
    assert lines.count("1") == 3


def test_processes_that_all_compute_are_not_taken_for_hanging(connect: Connect, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TICK_S", 0.01)
    monkeypatch.setattr(module, "end_process", lambda *_: pytest.fail("ended"))
    peers = joined(connect)
    for each in peers:
        each.watch(lambda: 5, lambda: timedelta(seconds=0.1))
    time.sleep(0.5)
    assert peers[0].failure() is None
    for each in peers:
        each.leave()


def test_a_failure_ends_the_others_even_if_their_main_threads_wait(connect: Connect, monkeypatch: pytest.MonkeyPatch):
    ended: list[tuple[int, list[str]]] = []

    def end(code: int, lines: list[str]) -> None:
        ended.append((code, lines))
        raise SystemExit  # of the thread

    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(module, "FAILURE_GRACE_S", 0.1)
    monkeypatch.setattr(module, "end_process", end)
    peers = joined(connect)
    for each in peers:
        each.watch(lambda: 5, lambda: LONG)
    peers[2].record_failure(Failure(2, "process 2 (b) failed: no rows", None))
    deadline = time.monotonic() + 20
    while len(ended) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    peers[2].leave()
    assert sorted(ended) == [(1, []), (1, ["error: process 2 (b) failed: no rows"])]


def test_a_store_that_is_gone_ends_the_process(monkeypatch: pytest.MonkeyPatch):
    ended: list[list[str]] = []
    gone = threading.Event()

    def end(_: int, lines: list[str]) -> None:
        ended.append(lines)
        gone.set()
        raise SystemExit

    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(module, "STORE_ANSWERS", timedelta(seconds=0.2))
    monkeypatch.setattr(module, "end_process", end)
    servers = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    (peer,) = joined(lambda: TCPStore("127.0.0.1", servers[0].port, is_master=False, wait_for_workers=False), 1, "a")
    peer.watch(lambda: 1, lambda: LONG)
    servers.clear()
    assert gone.wait(20)
    assert ended[0][0] == "error: process 0 (a), or the launcher of its machine, does not answer"
    assert peer.claim("text")  # prints rather than nothing
    assert peer.failure() is None


def test_records_are_json(connect: Connect):
    peer = Peers(connect(), rank=0, world_size=1)
    record = {"recipe": {"a.b": [1, None, "c"]}}
    assert peer.join(record, timeout=LONG) == [json.loads(json.dumps(record))]
