"""What the processes of a run tell each other through torch's store: who takes part, who waits for whom, what failed.

Collectives cannot tell it: one that waits for a lost process waits too. The store is a small TCP server of the launcher
or of the first process, and every process has its own connection to it, whatever carries the tensors.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import uuid4

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]  # not in __all__

from lora_cli.errors import LoraError
from lora_cli.run.console import format_duration
from lora_cli.run.print_error import error_lines
from lora_cli.run.signals import end_process
from lora_cli.run.worker import is_first_of_machine

POLL_S = 0.05  # seconds between two looks for the others
TICK_S = 1.0  # seconds between two heartbeats of a process
STORE_ANSWERS = timedelta(seconds=20)  # longest time that the store takes for an answer
# Seconds from a failure to the end of the others. A launcher, or a closed connection, ends most of them sooner.
FAILURE_GRACE_S = 8.0
FORM = "form"  # key of the store
SEE = "see its messages above, or in the log of its machine"


class RunError(LoraError):
    """An error that all processes of the run find, and whose message names the one that it is about."""


class LostPeer(RunError):
    """Another process of the run has ended or does not answer: an effect of its failure, not one of this process.

    Attributes:
        reported_here: whether the other process is on this machine and prints the error itself.
    """

    def __init__(self, message: str, *, hint: str | None, reported_here: bool = False) -> None:
        super().__init__(message, hint=hint, exit_code=1)
        self.reported_here = reported_here


class Failure(NamedTuple):
    """The first failure of a run."""

    rank: int | None  # of the process that reports it itself; None: all others report it
    message: str
    hint: str | None


def lasting_store(store: Store) -> Store:
    """Return the part of a store whose values are for further starts: torchrun keeps its store over them."""
    return PrefixStore("lora", store)


def wanted_form(lasting: Store) -> dict[str, Any] | None:
    """Return the form of the memory ladder that a process of this start, or of an earlier one, has asked for."""
    form: dict[str, Any] | None = json.loads(lasting.get(FORM)) if lasting.check([FORM]) else None
    return form


class Peers:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: of this process in the run.
        world_size: number of processes of the run, on all machines.
        hosts: names of the machines of all processes, by rank; empty before `join`.
        host: name of this machine.
        start: name of this start of the run, the same in all processes after `join`.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.hosts: list[str] = []
        self.host = socket.gethostname()
        self.start = uuid4().hex  # of this process alone, before `join`
        self._lasting = lasting_store(store)
        self._store = PrefixStore(self.start, self._lasting)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self, record: dict[str, Any], *, timeout: timedelta) -> list[dict[str, Any]]:
        """Wait until all processes have joined, and return the record of each, by rank.

        Raises:
            LoraError: some have not joined within `timeout`.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self._lasting.set(f"hello/{self.rank}", self.start)
        while self.rank and (found := self._first_start()) is None:
            self._check_deadline(deadline, timeout, lambda: [0])
            time.sleep(POLL_S)
        if self.rank:
            self.start = str(found)
            self._store = PrefixStore(self.start, self._lasting)
        self._store.set(f"join/{self.rank}", json.dumps({"host": self.host, "record": record}))
        while not self._is_complete("join"):
            if self.rank == 0:
                self._welcome()
            self._check_deadline(deadline, timeout, lambda: self._missing("join"))
            time.sleep(POLL_S)
        values = [json.loads(self._store.get(f"join/{rank}")) for rank in range(self.world_size)]
        self.hosts = [value["host"] for value in values]
        return [value["record"] for value in values]

    def _welcome(self) -> None:
        """Publish the name of this start with the greetings seen, also those that processes of earlier starts left."""
        keys = {rank: f"hello/{rank}" for rank in range(1, self.world_size)}
        seen = {rank: self._lasting.get(key).decode() for rank, key in keys.items() if self._lasting.check([key])}
        self._lasting.set("welcome", json.dumps([self.start, seen]))

    def _first_start(self) -> str | None:
        """Return the name of this start, if the first process has published it with the greeting of this process."""
        if not self._lasting.check(["welcome"]):
            return None
        start, seen = json.loads(self._lasting.get("welcome"))
        return str(start) if seen.get(str(self.rank)) == self.start else None

    def _is_complete(self, key: str) -> bool:
        """Return whether all processes have set `key`; one question to the store, however many they are."""
        return bool(self._store.check([f"{key}/{rank}" for rank in range(self.world_size)]))

    def _missing(self, key: str) -> list[int]:
        return [rank for rank in range(self.world_size) if not self._store.check([f"{key}/{rank}"])]

    def _check_deadline(self, deadline: float, timeout: timedelta, find_missing: Callable[[], Sequence[int]]) -> None:
        if time.monotonic() < deadline:
            return
        missing = find_missing()
        waited = format_duration(timeout.total_seconds())
        raise LoraError(
            f"{self.names(missing)} of {self.world_size} did not join the run within {waited}",
            hint="see the messages of its machine; all must start within distributed.timeout_minutes, and count the "
            "same machines and processes",
            exit_code=1,
        )

    def mark_begun(self) -> None:
        """Note that the run folder has the records of this run: when torchrun starts the workers again, they resume."""
        self._lasting.set("begun", "")

    def has_begun(self) -> bool:
        """Return whether an earlier start of these workers by the same torchrun has begun the run."""
        return bool(self._lasting.check(["begun"]))

    def want_form(self, form: dict[str, Any]) -> None:
        """Note the form of the memory ladder that all processes are to start again in."""
        with suppress(DistError):
            self._lasting.set(FORM, json.dumps(form))

    def wanted_form(self) -> dict[str, Any] | None:
        """Return the form that an earlier start of these workers has asked for."""
        return wanted_form(self._lasting)

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Return the values that all processes give under `key`, by rank; each value becomes JSON.

        Raises:
            LostPeer: another process has failed meanwhile.
        """
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        while not self._is_complete(key):
            if (failure := self.failure()) is not None:
                raise self._lost(failure)
            time.sleep(POLL_S)
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world_size)]

    def name(self, rank: int) -> str:
        """Return `process 1 (host-b)`."""
        return f"process {rank} ({self.hosts[rank]})" if self.hosts else f"process {rank}"

    def names(self, ranks: Sequence[int]) -> str:
        """Return `process 1 (host-b)`, or `processes 1, 2 (host-b) and 5 (host-c)`."""
        if len(ranks) == 1:
            return self.name(ranks[0])
        if not self.hosts:
            return f"processes {', '.join(map(str, ranks))}"
        by_host: dict[str, list[str]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(str(rank))
        return "processes " + " and ".join(f"{', '.join(group)} ({host})" for host, group in by_host.items())

    def claim(self, text: str) -> bool:
        """Return whether this process is the first one of its machine to print `text`.

        If the store does not answer, the first process of the machine prints it.
        """
        digest = blake2b(text.encode(), digest_size=8).hexdigest()
        try:
            return bool(self._store.add(f"printed/{self.host}/{digest}", 1) == 1)
        except DistError:
            return is_first_of_machine()

    def record_failure(self, failure: Failure) -> None:
        """Tell the others why the run ends; only the first failure counts."""
        with suppress(DistError):
            self._store.compare_set("failure", "", json.dumps(failure))

    def failure(self) -> Failure | None:
        """Return the first failure of the run, if a process has recorded one."""
        with suppress(DistError):
            if self._store.check(["failure"]):
                return Failure(*json.loads(self._store.get("failure")))
        return None

    def describe_loss(self, *, wait_s: float) -> LostPeer:
        """Return the error of this process after a connection to another one was closed.

        Args:
            wait_s: seconds in which a launcher ends this process, and in which living processes send a heartbeat.
        """
        before = self._heartbeats()
        time.sleep(wait_s)
        if (failure := self.failure()) is not None:
            return self._lost(failure)
        after = self._heartbeats()
        if not after:
            return self._lost(Failure(None, f"{self.name(0)}, or the launcher of its machine, ended", SEE))
        lost = [rank for rank in range(self.world_size) if rank != self.rank and after[rank] == before.get(rank)]
        message = f"{self.names(lost)} ended" if lost else "another process of this run ended"
        # The others, which lose their connections to this process as well, are not to name it.
        self._ended.set()
        self.record_failure(Failure(None, message, SEE))
        return self._lost(self.failure() or Failure(None, message, SEE))

    def watch(self, sequence: Callable[[], int], timeout: Callable[[], timedelta]) -> None:
        """Start to send heartbeats, and to watch those of the others, in a thread; it needs no time of the GPU.

        If another process does not come to a collective within the timeout after this one, or has failed, the thread
        ends this process, whose main thread waits in C code for a device or a connection.

        Args:
            sequence: returns the number of collectives that this process has begun.
            timeout: returns how long the others may take to begin the same one, at present.
        """
        self._send_heartbeat(0, sequence())
        self._thread = threading.Thread(target=self._watch, args=(sequence, timeout), name="peers", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Stop to watch: this process needs the others no more."""
        self._ended.set()
        if self._thread is not None:  # Python's end would stop it within C++ code, which aborts the process
            self._thread.join()

    def _watch(self, sequence: Callable[[], int], timeout: Callable[[], timedelta]) -> None:
        own, since, beat, suspects = -1, time.monotonic(), 0, list[int]()
        lost_since: float | None = None
        while not self._ended.wait(TICK_S):
            beat += 1
            if (now_at := sequence()) != own:
                own, since = now_at, time.monotonic()
            try:
                self._send_heartbeat(beat, own)
                lost_since = None
                if (failure := self.failure()) is not None:
                    self._end_after(failure)
                if time.monotonic() - since < timeout().total_seconds():
                    continue
                # Twice in a row, because a heartbeat may be older than the collective that its process began.
                behind = self._behind(own)
                if behind and behind == suspects:
                    self.record_failure(self._describe_hang(behind, timeout()))
                suspects = behind
            except DistError:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > STORE_ANSWERS.total_seconds():
                    message = f"{self.name(0)}, or the launcher of its machine, does not answer"
                    end_process(1, self.lines_after(LostPeer(message, hint=SEE)))

    def _send_heartbeat(self, beat: int, sequence: int) -> None:
        self._store.set(f"heartbeat/{self.rank}", f"{beat} {sequence}")

    def _heartbeats(self) -> dict[int, str]:
        """Return the last heartbeat of each process, `BEAT SEQUENCE`; empty if the store does not answer."""
        found: dict[int, str] = {}
        with suppress(DistError):
            for rank in range(self.world_size):
                known = self._store.check([f"heartbeat/{rank}"])
                found[rank] = self._store.get(f"heartbeat/{rank}").decode() if known else "-1 -1"
            return found
        return {}

    def _behind(self, sequence: int) -> list[int]:
        """Return the ranks that have begun the fewest collectives, if not as many as `sequence`.

        With hsdp, others may wait for one of them within their machine, and have not begun that number either.
        """
        begun = {rank: int(heartbeat.split()[1]) for rank, heartbeat in self._heartbeats().items()}
        return [rank for rank, count in begun.items() if count == min(begun.values()) < sequence]

    def _describe_hang(self, ranks: Sequence[int], timeout: timedelta) -> Failure:
        waited = format_duration(timeout.total_seconds())
        return Failure(
            None,
            f"{self.names(ranks)} did not answer for {waited} (distributed.timeout_minutes)",
            "see what the machine and the GPU do; if it only was slow, raise distributed.timeout_minutes",
        )

    def _end_after(self, failure: Failure) -> None:
        """End this process after the failure of another one, or of one that does not answer."""
        own = failure.rank == self.rank  # it ends by itself, and reports the failure
        if self._ended.wait(FAILURE_GRACE_S) or own:
            return
        end_process(1, self.lines_after(self._lost(failure)))

    def _lost(self, failure: Failure) -> LostPeer:
        reported_here = failure.rank is not None and self.hosts[failure.rank] == self.host
        return LostPeer(failure.message, hint=failure.hint, reported_here=reported_here)

    def lines_after(self, error: LostPeer) -> list[str]:
        """Return the lines to print in this process for the failure of another one: each once on a machine."""
        return [] if error.reported_here or not self.claim(error.message) else error_lines(error)
