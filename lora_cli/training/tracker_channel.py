"""Memory that the training process and the process of a tracker share: request, reports, counts, how the run ends.

Memory, and no pipe: a library may close all files of its process, or leave them open in a process that outlives it, and
a process that is stopped reads nothing. In memory, none of this lets the other process wait, or hides that one is gone.
Both look at it from time to time. No torch.
"""

import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from lora_cli.training.tracked_records import Counts, Mark
from lora_cli.training.tracker_job import Status

STATUS, STEPS, EVALUATIONS, MARK = range(4)  # numbers of 8 bytes, each written by one process, at once
NUMBERS = 4 * 8  # bytes
REPORTS = 64 << 10  # bytes behind the numbers: all reports of a run; the request is behind them
STATUSES: tuple[Status, ...] = get_args(Status)


class Channel:
    """One side of the shared memory; the training process writes the status, the tracker everything else."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is that of `shared_file`, and can be closed afterwards.

        Raises:
            OSError: there is not enough memory.
        """
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers = memoryview(self._memory)[:NUMBERS].cast("q")
        self._at = NUMBERS  # place of the next report

    def request(self) -> dict[str, Any]:
        """Return the request."""
        found: dict[str, Any] = json.loads(self._memory[NUMBERS + REPORTS :])
        return found

    @property
    def status(self) -> Status | None:
        """How the run has ended; None while it goes on."""
        number = self._numbers[STATUS]
        return STATUSES[number - 1] if number else None

    def end(self, status: Status) -> None:
        """Tell the tracker how the run has ended."""
        self._numbers[STATUS] = STATUSES.index(status) + 1

    def report(self, event: str, **values: Any) -> None:
        """Tell the training process of an event."""
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        if self._at + len(line) <= NUMBERS + REPORTS:
            self._memory[self._at : self._at + len(line)] = line
            self._at += len(line)

    def reports(self) -> Iterator[dict[str, Any]]:
        """Yield the reports since the last call."""
        while (end := self._memory.find(b"\n", self._at, NUMBERS + REPORTS)) >= 0:
            try:
                report = json.loads(self._memory[self._at : end])
            except ValueError:  # some processors show the end of a line before its beginning
                return
            self._at = end + 1
            yield report

    def record_sent(self, mark: Mark, counts: Counts) -> None:
        """Record how far the tracker is: killed at any time, it leaves its counts."""
        self._numbers[STEPS], self._numbers[EVALUATIONS] = counts
        self._numbers[MARK] = mark[0] * 2 + mark[1] + 3  # 0 is none; the first mark has step -1

    @property
    def sent(self) -> Counts:
        """Numbers of the records that the tracker has taken since its start."""
        return Counts(self._numbers[STEPS], self._numbers[EVALUATIONS])

    @property
    def mark(self) -> Mark | None:
        """Place of the last record that it has; None before it knows."""
        number = self._numbers[MARK]
        return divmod(number - 3, 2) if number else None


@contextmanager
def shared_file(request: Mapping[str, Any]) -> Iterator[int]:
    """Yield the descriptor of a file in memory (on macOS, one without a name) with a request, for two Channels.

    Raises:
        OSError: too many files are open, or memory or disk is full.
    """
    with (
        os.fdopen(os.memfd_create("lora-tracker"), "w+b")
        if sys.platform == "linux"
        else tempfile.TemporaryFile() as file
    ):
        file.write(bytes(NUMBERS + REPORTS) + json.dumps(request).encode())
        file.flush()
        yield file.fileno()
