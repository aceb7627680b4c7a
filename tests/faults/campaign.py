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
from pathlib import Path
from typing import Any, Literal, NamedTuple

# survived: the tool did what it should; lost: a result or input is missing, half, or of two runs, or the next command
# fails; traceback: not one error and one hint; silent: another result than it should be, without a word; hang: the time
# limit passed, or a process is left over; not tried: the fault did not occur, for example the command ended before it.
Verdict = Literal["survived", "lost", "traceback", "silent", "hang", "not tried"]
PREPARE_SECONDS = 900.0


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
    prepare: Callable[[Path], None]  # write what all cases share into an empty folder; called once for each worker
    cases: Callable[[int, Path], Iterator[Any]]  # of a seed and a prepared folder; equal for equal seeds; may not end
    try_case: Callable[[Any, Path], Outcome]  # a case in a prepared folder, which is afterwards as it was
    count: int | None  # cases of a complete campaign; None: all of `cases`, which ends
    share: float  # of the time, if that is limited, relative to the other campaigns
    seconds: float = 120.0  # time limit of a case


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
    campaign: Campaign, scratch: Path, *, seed: int, numbers: Iterable[int] | None, workers: int, until: float | None
) -> Iterator[Result]:
    """Try the cases of a campaign in forked processes, and yield their results as they end.

    Args:
        campaign: to run.
        scratch: an empty folder; a prepared folder for each worker is made in it.
        seed: of the cases.
        numbers: of the cases to try, ascending; None for all, up to `campaign.count`.
        workers: cases that run at the same time.
        until: the moment (time.monotonic) after which no case is started.
    """
    folders = [scratch / f"worker-{worker}" for worker in range(workers)]
    for folder in folders:
        _prepare(campaign, folder)
    chosen = _choose(campaign.cases(seed, folders[0]), campaign.count, numbers)
    running: dict[Path, _Running] = {}
    while True:
        for folder in folders:
            if folder in running or (until is not None and time.monotonic() > until):
                continue
            if (numbered := next(chosen, None)) is not None:
                running[folder] = _start(campaign, *numbered, folder)
        if not running:
            return
        first = min(case.deadline for case in running.values())
        pipes = [case.pipe for case in running.values()]
        ready = select.select(pipes, [], [], max(0.0, first - time.monotonic()))[0]
        for folder, case in list(running.items()):
            if case.pipe in ready or time.monotonic() > case.deadline:
                del running[folder]
                outcome, clean = _end(case, in_time=case.pipe in ready)
                if not clean:  # the folder may be half changed
                    shutil.rmtree(folder)
                    _prepare(campaign, folder)
                yield Result(case.number, outcome)


def _choose(cases: Iterator[Any], count: int | None, numbers: Iterable[int] | None) -> Iterator[tuple[int, Any]]:
    wanted = None if numbers is None else list(numbers)
    for number, case in enumerate(cases):
        if wanted is None:
            if count is not None and number >= count:
                return
            yield number, case
        else:
            if not wanted or number > wanted[-1]:
                return
            if number in wanted:
                yield number, case


def _prepare(campaign: Campaign, folder: Path) -> None:
    folder.mkdir(parents=True)
    running = _fork(0, lambda: campaign.prepare(folder), PREPARE_SECONDS)
    ready = select.select([running.pipe], [], [], PREPARE_SECONDS)[0]
    outcome, _ = _end(running, in_time=bool(ready))
    if outcome.failed:
        raise RuntimeError(f"{campaign.title} cannot be prepared: {outcome.detail}")


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


def _end(case: _Running, *, in_time: bool) -> tuple[Outcome, bool]:
    """Return the outcome of a case, and whether it cleaned up; end its processes."""
    data = b""
    if in_time:
        while block := os.read(case.pipe, 1 << 16):
            data += block
    os.close(case.pipe)
    with suppress(ProcessLookupError):
        os.killpg(case.pid, signal.SIGKILL)
    _, status = os.waitpid(case.pid, 0)
    if data:
        return pickle.loads(data), True
    if in_time:
        return Outcome("traceback", "the process of the case", f"ended by signal {os.WTERMSIG(status)}"), False
    return Outcome("hang", "", "no end within the time limit"), False
