"""Experiment tracking of a run, as training sees it: a process for each tracker, which never holds up a step.

Training writes metrics.jsonl as always. The processes follow it (`tracker_process.py`); this file starts them, prints
what they report, and ends them within the time that the recipe allows.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec
from lora_cli.run.hub import environment_of_others
from lora_cli.run.signals import SIGNALS, stop_request

# -P: not from the working folder, where W&B and MLflow leave folders with their names.
PROGRAM = (sys.executable, "-P", "-m", "lora_cli.training.tracker_process")
FAILED_S = 5  # seconds that a run which has failed waits for its trackers: its other processes wait for it
# Of a worker of several: the trackers' process is none, but libraries would take it for one.
OF_WORKERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_LAUNCHERS = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_", "ACCELERATE_")

Info = Callable[[str], None]


class _Process:
    """The process of one tracker, and what it has reported."""

    def __init__(self, name: TrackerName, request: Mapping[str, Any], folder: Path) -> None:
        self.name, self.folder = name, folder
        environment = {
            key: value
            for key, value in environment_of_others().items()
            if key not in OF_WORKERS and not key.startswith(OF_LAUNCHERS)
        }
        # It would die of a signal to the whole group before it ignores them: they wait until it does.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with open(folder / f"{name}.log", "ab") as log:
                self.process = subprocess.Popen(
                    PROGRAM,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C at the terminal is for the run alone
                )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self.reports = self.process.stdin, self.process.stdout.fileno()
        os.set_blocking(self.reports, False)
        self._text = b""
        self.end: dict[str, Any] | None = None
        self.problem: str | None = None
        self.ready = self.closed = False
        self._write(json.dumps({"tracker": name, **request}).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with suppress(BrokenPipeError):  # it has ended already, which its reports tell
            self._requests.write(line)
            self._requests.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the reports since the last call, without waiting."""
        while not self.closed:
            try:
                data = os.read(self.reports, 1 << 16)
            except BlockingIOError:
                break
            self.closed = not data
            *lines, self._text = (self._text + data).split(b"\n")
            yield from filter(None, map(_as_report, lines))

    def finish(self, status: str) -> None:
        """Tell it how the run has ended."""
        self._write(f"{status}\n".encode())

    def kill(self) -> None:
        """End it, with the processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def release(self) -> None:
        """Leave it alone: it ends by itself within its time."""
        with suppress(BrokenPipeError):
            self._requests.close()


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
        self.status = "failed"  # until the run sets it
        self._info, self._limit = info, float(spec.timeout_seconds if spec else 0)
        self._processes: list[_Process] = []
        if spec is not None and run is not None:
            request = {"spec": spec.model_dump(mode="json"), "run": str(run), "done": done, "pid": os.getpid()}
            self._processes = [_Process(name, request, run / "tracking") for name in spec.to]

    def poll(self) -> None:
        """Print what the trackers have reported: where the run is shown, the first failure, an unexpected end."""
        for each in self._processes:
            was_closed = each.closed
            for report in each.read():
                self._receive(each, report)
            if each.closed and not was_closed and each.end is None:
                log = each.folder / f"{each.name}.log"
                self._info(f"warning: {each.name}: its process has ended ({_how(each)}); the run goes on, see {log}")

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
            case "end":
                each.end = report

    def finish(self) -> None:
        """Let the trackers send the rest, for as long as the recipe allows; print how much each one has.

        A signal ends the waiting, as the time does. After a failure of the run, they go on alone.
        """
        if not self._processes:
            return
        for each in self._processes:
            each.finish(self.status)
        limit = min(FAILED_S, self._limit) if self.status == "failed" else self._limit
        deadline = time.monotonic() + limit
        # After a failure, the launcher's second signal has to end this process at once.
        with nullcontext(threading.Event()) if self.status == "failed" else stop_request() as stop:
            while (
                waiting := [each for each in self._processes if not (each.end or each.closed)]
            ) and not stop.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                select.select([each.reports for each in waiting], [], [], min(left, 0.1))
                self.poll()
        for each in self._processes:
            if each.end is None and self.status == "failed":
                each.release()
            elif each.end is None:
                each.kill()
            line = _summary(each, self.status, "when a signal came" if stop.is_set() else f"after {limit:g} s")
            self._info(line if _is_complete(each) else f"warning: {line}")
            if each.end is not None:
                each.process.wait()


@contextmanager
def tracking(spec: TrackingSpec | None, run: Path | None, *, done: int, info: Info) -> Iterator[Tracking]:
    """Track a run within the block, which sets the `status`; see Tracking."""
    trackers = Tracking(spec, run, done=done, info=info)
    try:
        yield trackers
    finally:
        trackers.finish()


def _as_report(line: bytes) -> dict[str, Any] | None:
    """Return a report; None for what Python's start has printed: it may be set up to greet."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None


def _summary(each: _Process, status: str, when: str) -> str:
    """Return the line on what a tracker has at the end; `when` says what ended the waiting."""
    later = "lora train RECIPE --resume sends them from metrics.jsonl"
    if each.end is None:
        where = f"what it has is in {each.folder}; the rest stays in metrics.jsonl"
        if each.closed:
            return f"{each.name}: {where}"
        waited = f"{each.name}: not ready {when}"
        why = f": {each.problem}" if each.problem and not each.ready else ""
        if status == "failed":
            return f"{waited}{why}; it goes on alone"
        return f"{waited}, and ended{why}; {where}"
    steps, evaluations, left = (int(each.end[key]) for key in ("steps", "evaluations", "left"))
    of = f"{steps:,} of {steps + left:,}" if left else f"{steps:,}"
    of += f" step{'s' * (steps + left != 1)} and {evaluations:,} evaluation{'s' * (evaluations != 1)}"
    line = f"{each.name}: {of} sent"
    if left:
        line += (
            f", {left:,} not sent: {each.end['why'].rstrip('.')}; {later}"
            if each.end["why"]
            else "; the last one follows on --resume"
        )
    if each.end["uploaded"]:
        line += f", with {', '.join(each.end['uploaded'])}"
    elif each.end["uploaded"] is not None:
        line += f"; the files were not sent: {each.end['why']}"
    return line


def _is_complete(each: _Process) -> bool:
    """Return whether a tracker has everything."""
    return each.end is not None and not each.end["left"] and each.end["uploaded"] != []


def _how(each: _Process) -> str:
    code = each.process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
