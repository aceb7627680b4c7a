"""Experiment tracking of a run, as training sees it: a process for each tracker, which never holds up a step.

Training writes metrics.jsonl as always. The processes follow it (`tracker_process.py`); this file starts them, prints
what they report, ends them within the time that the recipe allows, and counts what each one has.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec
from lora_cli.run import atomic
from lora_cli.run.hub import environment_of_others
from lora_cli.run.read_file import UnreadableError
from lora_cli.run.signals import SIGNALS, stop_request
from lora_cli.training.tracked_records import Counts, count_after, read_state
from lora_cli.training.tracker_channel import Channel, shared_file
from lora_cli.training.tracker_job import Status

# -P: not from the working folder, where W&B and MLflow leave folders with their names.
PROGRAM = (sys.executable, "-P", "-m", "lora_cli.training.tracker_process")
FAILED_S = 5  # seconds that a run which has failed waits for its trackers: its other processes wait for it
KILLED_S = 2  # seconds that a tracker may take to end once it is killed: one that waits for a disk does not end
POLL_S = 0.05  # seconds between two looks at the trackers when the run has ended
# Of a worker of several: the trackers' process is none, but libraries would take it for one.
OF_WORKERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_LAUNCHERS = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_", "ACCELERATE_")
LATER = "lora train RECIPE --resume sends them from metrics.jsonl"

Info = Callable[[str], None]


class Sent(NamedTuple):
    """What a tracker has of a run when its process ends, or when the run does; `tracking/sent.json` has it."""

    steps: int  # records that it has taken since this start of the run
    evaluations: int
    steps_left: int
    evaluations_left: int
    problem: str | None = None  # why something is left
    cut_off: bool = False  # its process has ended before it told what it has, or goes on alone
    uploaded: list[str] | None = None  # names of the files; None if none were to be sent
    unreadable: Sequence[str] = ()  # names of files that could not be read

    @property
    def is_complete(self) -> bool:
        """Whether the tracker has everything."""
        return not (self.steps_left or self.evaluations_left or self.cut_off or self.unreadable or self.uploaded == [])

    def line(self, name: str, folder: Path) -> str:
        """Return the line on it for the terminal."""
        left = self.steps_left + self.evaluations_left
        line = f"{name}: {_of(self.steps, self.steps_left, 'step')}"
        line += f" and {_of(self.evaluations, self.evaluations_left, 'evaluation')} sent"
        if left:
            line += (
                f", {left:,} not sent: {self.problem}; {LATER}"
                if self.problem
                else "; the last one follows on --resume"
            )
        elif self.cut_off:
            lost = ", of which the last may be lost" if self.steps + self.evaluations else ""
            line += f"{lost}: {self.problem}; see {folder}"
        if self.uploaded:
            line += f", with {', '.join(self.uploaded)}"
        elif self.uploaded is not None:
            line += f"; the files were not sent: {self.problem or 'they cannot be read'}"
        if self.unreadable and self.uploaded:
            line += f"; not sent, as they are missing or damaged: {', '.join(self.unreadable)}"
        return line


class _Process:
    """The process of one tracker, and what it has reported."""

    def __init__(self, name: TrackerName, request: Mapping[str, Any], folder: Path) -> None:
        """Start it.

        Raises:
            OSError, MemoryError: it cannot be started.
        """
        self.name, self.folder = name, folder
        self.end: dict[str, Any] | None = None
        self.problem: str | None = None
        self.ready = False
        self.told_end = False
        with shared_file({"tracker": name, **request}) as memory, _open_log(folder / f"{name}.log") as log:
            self.channel = Channel(memory)
            self.process = _start(memory, log.fileno())

    def how_it_ended(self) -> str | None:
        """Return how the process has ended; None if it has not."""
        code = self.process.poll()
        if code is None or code >= 0:
            return None if code is None else f"exit code {code}"
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"

    def kill(self) -> None:
        """End it, with the processes that it has started; one that waits for a disk is left to the system."""
        # What an ended one has left behind may be sending yet; and its number may be that of another group now.
        if self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):  # on macOS, of a group whose processes have just ended
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(KILLED_S)

    def wait(self) -> None:
        """Wait for the process, which has told its end; kill one that was stopped since."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED_S)
        self.kill()

    def left(self, metrics: Path) -> Counts:
        """Return how many records it lacks."""
        if self.end is not None:
            return Counts(*self.end["left"])
        return _left(metrics, self.folder / f"{self.name}.json", self.channel)


def _open_log(path: Path) -> BinaryIO:
    # A pipe (FIFO) in the place of the log is refused: opening it would wait for a reader.
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def _start(memory: int, log: int) -> "subprocess.Popen[bytes]":
    environment = {
        key: value
        for key, value in environment_of_others().items()
        if key not in OF_WORKERS and not key.startswith(OF_LAUNCHERS)
    }
    # It would die of a signal to the whole group before it ignores them: they wait until it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            (*PROGRAM, str(memory)),
            stdin=subprocess.DEVNULL,  # libraries ask for a login
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(memory,),
            start_new_session=True,  # Ctrl-C at the terminal is for the run alone
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _left(metrics: Path, state: Path, channel: Channel | None) -> Counts:
    """Return how many records of a metrics log a tracker lacks that has not told it."""
    mark = channel.mark if channel is not None else None
    try:
        return count_after(metrics, read_state(state).mark if mark is None else mark)
    except UnreadableError:
        return Counts(0, 0)


class Tracking:
    """The trackers of one run; without any, it does nothing. Create it in the first process only."""

    def __init__(self, spec: TrackingSpec | None, run: Path | None, *, done: int, info: Info) -> None:
        """Start a process for each tracker of `spec`; `run`/tracking/config.json is written already.

        Args:
            spec: of the recipe; None: nothing is tracked.
            run: the run folder; None in other processes than the first.
            done: steps of the run before this start.
            info: prints a line.
        """
        self.status: Status = "failed"  # until the run sets it
        self._info, self._limit = info, float(spec.timeout_seconds if spec else 0)
        self._processes: list[_Process] = []
        self._not_started: dict[TrackerName, str] = {}
        if spec is None or run is None:
            return
        self._run = run
        request = {"spec": spec.model_dump(mode="json"), "run": str(run), "folder": os.path.abspath(run)}
        for name in spec.to:
            try:
                each = _Process(name, {**request, "done": done, "pid": os.getpid()}, run / "tracking")
            except (OSError, MemoryError) as error:
                why = getattr(error, "strerror", None) or "out of memory"
                self._not_started[name] = f"its process cannot be started: {why}"
                info(f"warning: {name}: {self._not_started[name]}; the run goes on without it")
            else:
                self._processes.append(each)

    def poll(self) -> None:
        """Print what the trackers have reported: where the run is shown, the first failure, an unexpected end."""
        for each in self._processes:
            ended = None if each.told_end else each.how_it_ended()  # before its last report is read
            for report in each.channel.reports():
                self._receive(each, report)
            if ended is not None:
                each.told_end = True
                if each.end is None:
                    each.problem = f"its process has ended ({ended})"
                    log = each.folder / f"{each.name}.log"
                    self._info(f"warning: {each.name}: {each.problem}; the run goes on, see {log}")

    def _receive(self, each: _Process, report: dict[str, Any]) -> None:
        match report["event"]:
            case "ready":
                each.ready = True
                verb = "goes on" if report["resumed"] else "tracked"
                again = ", which answers again" if each.problem else ""
                self._info(f"{each.name}: {verb} {report['place']}{again}")
            case "problem":
                each.problem = report["text"]
                self._info(f"warning: {each.name}: {each.problem}; the run goes on, and it is tried again")
            case "note":
                self._info(f"warning: {each.name}: {report['text']}; the run goes on")
            case "end":
                each.end = report

    def finish(self) -> None:
        """Let the trackers send the rest, for as long as the recipe allows; print and record how much each one has.

        A signal ends the waiting, as the time does. After a failure of the run, they go on alone.
        """
        if not (self._processes or self._not_started):
            return
        for each in self._processes:
            each.channel.end(self.status)
        limit = min(FAILED_S, self._limit) if self.status == "failed" else self._limit
        deadline = time.monotonic() + limit
        # After a failure, the launcher's second signal has to end this process at once.
        with nullcontext(threading.Event()) if self.status == "failed" else stop_request() as stop:
            while self._is_waiting() and not stop.is_set() and time.monotonic() < deadline:
                time.sleep(POLL_S)
        when = "when a signal came" if stop.is_set() else f"after {limit:g} s"
        found = {name: self._not_sent(name, why) for name, why in self._not_started.items()}
        found |= {each.name: self._ended(each, when) for each in self._processes}
        for name, sent in found.items():
            line = sent.line(name, self._run / "tracking")
            self._info(line if sent.is_complete else f"warning: {line}")
        self._record(found)

    def _is_waiting(self) -> bool:
        self.poll()
        return any(each.end is None and not each.told_end for each in self._processes)

    def _ended(self, each: _Process, when: str) -> Sent:
        """End a tracker that has not ended, and return what it has."""
        problem, alone = each.problem, False
        if each.end is not None:
            each.wait()
            problem = each.end["why"] or None
        elif not each.told_end:
            alone = self.status == "failed"
            if not alone:
                each.kill()
            why = f": {each.problem}" if each.problem and not each.ready else ""
            problem = f"not ready {when}, and {'it goes on alone' if alone else 'ended'}{why}"
        left = each.left(self._run / "metrics.jsonl")
        files = {key: value for key, value in (each.end or {}).items() if key in ("uploaded", "unreadable")}
        return Sent(*each.channel.sent, *left, problem, each.end is None, **files)

    def _not_sent(self, name: TrackerName, why: str) -> Sent:
        left = _left(self._run / "metrics.jsonl", self._run / "tracking" / f"{name}.json", None)
        return Sent(0, 0, *left, why, cut_off=True)

    def _record(self, found: Mapping[TrackerName, Sent]) -> None:
        """Write what the trackers have into the run folder."""
        records = {name: {**sent._asdict(), "complete": sent.is_complete} for name, sent in found.items()}
        try:
            atomic.write_json(self._run / "tracking" / "sent.json", records)
        except OSError as error:
            self._info(f"warning: tracking/sent.json cannot be written: {error.strerror}")


@contextmanager
def tracking(spec: TrackingSpec | None, run: Path | None, *, done: int, info: Info) -> Iterator[Tracking]:
    """Track a run within the block, which sets the `status`; see Tracking."""
    trackers = Tracking(spec, run, done=done, info=info)
    try:
        yield trackers
    finally:
        trackers.finish()


def _of(sent: int, left: int, what: str) -> str:
    """Return how many records were sent: `2 of 3 steps`."""
    return f"{f'{sent:,} of ' if left else ''}{sent + left:,} {what}{'' if sent + left == 1 else 's'}"
