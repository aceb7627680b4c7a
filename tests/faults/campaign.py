"""Fault campaigns: what a campaign, a case and an outcome are, and how cases are tried, each in a process of its own.

A campaign is an entry of `campaigns.py: CAMPAIGNS`. Its cases are numbered: the seed and the number reproduce a case.
"""

import os
import pickle
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

# survived: the tool did what it should; lost: a result or input is missing, half, or of two runs, or the next command
# fails; traceback: not one error and one hint; silent: another result than it should be, without a word; hang: the time
# limit passed, or a process is left over; not tried: the fault did not occur, for example the command ended before it.
Verdict = Literal["survived", "lost", "traceback", "silent", "hang", "not tried"]
PREPARE_SECONDS = 900.0
CRASHED = "the process of the case ended"


class Outcome(NamedTuple):
    """How one case ended."""

    verdict: Verdict
    fault: str  # what was done, for example `merge, killed before os.rename out`
    detail: str = ""  # what is wrong: a message, the end of a traceback, the file that differs

    @property
    def failed(self) -> bool:
        """Whether the tool did what it must not do."""
        return self.verdict not in ("survived", "not tried")


class Campaign(NamedTuple):
    """A kind of faults, and its cases."""

    title: str  # in the table
    inputs: str  # name of what `prepare` writes; campaigns with the same name share it
    prepare: Callable[[Path], None]  # write what all cases share into an empty folder; each worker gets a copy
    cases: Callable[[int, Path], Iterator[Any]]  # of a seed and a prepared folder; equal for equal seeds; may not end
    try_case: Callable[[Any, Path], Outcome]  # a case in a prepared folder, which is afterwards as it was
    count: int | None = None  # cases of a complete campaign; None: all of `cases`, which ends
    share: float = 1.0  # of the time, if that is limited, relative to the other campaigns
    seconds: float = 300.0  # time limit of a case


class Result(NamedTuple):
    """The outcome of one case of a campaign."""

    number: int
    outcome: Outcome


class _Running(NamedTuple):
    number: int
    pid: int
    pipe: int
    deadline: float  # of time.monotonic


def run_campaign(
    campaign: Campaign,
    prepared: Path,
    *,
    seed: int,
    count: int | None,
    only: int | None,
    workers: int,
    until: float | None,
) -> Iterator[Result]:
    """Try the cases of a campaign in forked processes, and yield their results as they end.

    Args:
        campaign: to run.
        prepared: the folder that `campaign.prepare` has written; each worker gets a copy of it.
        seed: of the cases.
        count: cases to try; None for all that `cases` yields.
        only: the number of the only case to try.
        workers: cases that run at the same time.
        until: the moment (time.monotonic) after which no case is started.
    """
    folders = [prepared.with_name(f"{prepared.name}-{worker}") for worker in range(workers)]
    for folder in folders:
        _copy(prepared, folder)
    chosen = _choose(campaign.cases(seed, prepared), count, only)
    running: dict[Path, _Running] = {}
    while True:
        for folder in folders:
            if folder in running or (until is not None and time.monotonic() > until):
                continue
            if (numbered := next(chosen, None)) is not None:
                running[folder] = _start(campaign, *numbered, folder)
        if not running:
            return
        for folder, case in list(running.items()):
            if (outcome := _poll(case)) is not None:
                del running[folder]
                if outcome.verdict == "hang" or outcome.fault == CRASHED:  # the folder may be half changed
                    _copy(prepared, folder)
                yield Result(case.number, outcome)
        _wait(running.values())


def _choose(cases: Iterator[Any], count: int | None, only: int | None) -> Iterator[tuple[int, Any]]:
    """Return cases with their numbers: the first `count`, or one."""
    numbered = enumerate(cases)
    return islice(numbered, count) if only is None else islice(numbered, only, only + 1)


def prepare(campaign: Campaign, folder: Path) -> None:
    """Write what the cases of a campaign share into the folder `folder`, which is emptied.

    Raises:
        RuntimeError: a command of the preparation failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    running = _fork(0, lambda: campaign.prepare(folder), PREPARE_SECONDS)
    while (outcome := _poll(running)) is None:
        _wait([running])
    if outcome.failed:
        raise RuntimeError(f"{campaign.title} cannot be prepared: {outcome.detail}")


def _copy(prepared: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(prepared, folder, symlinks=True)


def _start(campaign: Campaign, number: int, case: Any, folder: Path) -> _Running:
    return _fork(number, lambda: campaign.try_case(case, folder), campaign.seconds)


def _fork(number: int, action: Callable[[], Outcome | None], seconds: float) -> _Running:
    """Call `action` in a forked process, which is the leader of a process group, and send its outcome into a pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(reading)
        try:
            outcome = action() or Outcome("survived", "")
        except BaseException:  # noqa: BLE001 - reported as the outcome; nothing may reach the frames of the parent
            outcome = Outcome("traceback", "the campaign itself", traceback.format_exc()[-2000:])
        with suppress(BrokenPipeError), os.fdopen(writing, "wb") as stream:
            pickle.dump(outcome, stream)
        os._exit(0)
    os.close(writing)
    return _Running(number, pid, reading, time.monotonic() + seconds)


def _wait(running: Iterable[_Running]) -> None:
    """Wait until a process may have ended."""
    select.select([case.pipe for case in running], [], [], 0.2)


def _poll(case: _Running) -> Outcome | None:
    """Return the outcome of a case, after its processes are ended; None if it has time left and runs."""
    pid, status = os.waitpid(case.pid, os.WNOHANG)
    in_time = bool(pid)
    if not in_time and time.monotonic() < case.deadline:
        return None
    with suppress(ProcessLookupError):
        os.killpg(case.pid, signal.SIGKILL)  # also processes of the case that are left over
    if not in_time:
        os.waitpid(case.pid, 0)
    with os.fdopen(case.pipe, "rb") as stream:
        data = stream.read() if in_time else b""
    if not in_time:
        return Outcome("hang", "", "no end within the time limit")
    if not data:
        return Outcome("traceback", CRASHED, f"exit code {os.waitstatus_to_exitcode(status)}")
    outcome = pickle.loads(data)
    assert isinstance(outcome, Outcome)
    return outcome
