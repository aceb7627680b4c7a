"""The process of one experiment tracker: follows metrics.jsonl of a run, and sends each step and evaluation.

A process of its own, because trackers block, patch other libraries, install handlers of signals and of the exit, and
run threads; here none of that touches training. The metrics log is its buffer: what a tracker cannot take now is read
and sent later, also by a resumed run. `training/tracking.py` starts this process.
"""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lora_cli.errors import first_line
from lora_cli.recipe.dump import dump_values
from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec
from lora_cli.run import atomic
from lora_cli.run.folder import RunFolder
from lora_cli.run.metrics_log import MetricsFollower
from lora_cli.run.quick_imports import quick_imports
from lora_cli.run.redact import redact_text, redact_values, without_private
from lora_cli.run.signals import SIGNALS

POLL_S = 0.5  # seconds between two looks at the metrics log
SAVE_S = 1.0  # seconds between two writes of the state
PAUSES_S = (1, 2, 4, 8, 15, 30)  # before a call that has failed is tried again; the last one is repeated
EVALUATION = {"eval_loss": "eval/loss", "eval_accuracy": "eval/accuracy"}  # keys of metrics.jsonl, and of trackers

Mark = tuple[int, int]  # place of a record in the order in which it is sent: its step; 0 for training, 1 for evaluation
START: Mark = (-1, 0)


def mark_of(record: Mapping[str, Any]) -> Mark:
    """Return the place of a record of metrics.jsonl."""
    return int(record["step"]), int("eval_loss" in record)


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by the names that trackers show: `train/loss`, `eval/loss`."""
    return {
        EVALUATION.get(key, f"train/{key}"): value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class State(NamedTuple):
    """What the run folder records of a tracked run, in `tracking/NAME.json`."""

    id: str | None = None
    where: Mapping[str, Any] | None = None  # its project and store
    mark: Mark = START  # of the last record that the tracker has
    configured: bool = False  # the tracker has the configuration

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**self._asdict(), "mark": list(self.mark)}


def read_state(path: Path) -> State:
    """Return the state in `path`; a new one if there is none, or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        step, kind = values["mark"]
        return State(str(values["id"]), values["where"], (int(step), int(kind)), bool(values["configured"]))
    except (OSError, ValueError, KeyError, TypeError):
        return State()


class Pending:
    """Records of the metrics log that the tracker does not have yet, in order."""

    def __init__(self, path: Path, mark: Mark, awaits_evaluation: Callable[[int], bool]) -> None:
        """`awaits_evaluation` tells whether an evaluation after a step is due.

        Such a step is held until its evaluation is there: W&B takes no more values of a step once the next one began,
        and a run that is stopped during the evaluation makes it when it is resumed.
        """
        self._follower = MetricsFollower(path)
        self._records: deque[dict[str, Any]] = deque()
        self._mark = mark
        self._awaits_evaluation = awaits_evaluation

    def read(self, *, reopen: bool = True) -> None:
        """Read what was written since the last call; see MetricsFollower.read."""
        for record in self._follower.read(reopen=reopen):
            if mark_of(record) > self._mark:
                self._records.append(record)
                self._mark = mark_of(record)

    def next(self, *, whole: bool = False) -> dict[str, Any] | None:
        """Return the next record, which stays the next one; with `whole`, also one whose evaluation is awaited."""
        if not self._records:
            return None
        step, kind = mark_of(self._records[0])
        held = kind == 0 and len(self._records) == 1 and self._awaits_evaluation(step)
        return None if held and not whole else self._records[0]

    def remove(self) -> None:
        """Remove the next record."""
        self._records.popleft()

    @property
    def steps(self) -> int:
        """Number of steps that are left."""
        return sum(mark_of(record)[1] == 0 for record in self._records)


class Sender:
    """One tracker at work. What its library raises is tried again, then counted; nothing of it gets out."""

    def __init__(self, request: Mapping[str, Any], report: Callable[..., None]) -> None:
        """`request` is that of `training/tracking.py`; `report` tells the training process of an event."""
        with quick_imports():  # of torch and Accelerate: seconds, in which signals are ignored already
            from lora_cli.training import trackers

        self._trackers = trackers
        run = RunFolder(Path(request["run"]), -1)
        self._name: TrackerName = request["tracker"]
        self._state_file = run.tracking / f"{self._name}.json"
        self._config = json.loads((run.tracking / "config.json").read_text(encoding="utf-8"))
        state = read_state(self._state_file)
        spec = TrackingSpec.model_validate(request["spec"])
        self._job = trackers.Job(
            tracker=self._name,
            spec=spec,
            run=run.path,
            run_id=None,
            configured=False,
            new_id=uuid.uuid4().hex,
            done=int(request["done"]),
            pid=int(request["pid"]),
        )
        if state.where == self._job.where:
            self._job = self._job._replace(run_id=state.id, configured=state.configured)
        else:  # a tracked run of its own, with every step so far
            state = State(where=self._job.where)
        if self._name == "tensorboard":  # its reader leaves out what an earlier start has sent after this step
            state = state._replace(mark=min(state.mark, (self._job.done, 1)))
        self._state, self._run, self._report = state, run, report
        self._saved_at = 0.0
        self._sent = {"steps": 0, "evaluations": 0}
        self._tracker: Any = None
        self._told = False
        self._why = ""
        self.ending = threading.Event()  # set when the run has ended
        self.status: trackers.Status = "failed"
        self.orphaned = False
        self._pending = Pending(run.metrics, state.mark, self._awaits_evaluation)

    def _awaits_evaluation(self, step: int) -> bool:
        every = self._config["recipe"]["training"]["eval_every"]
        due = step == self._config["steps"] or (every is not None and step % every == 0)
        return due and bool(self._config["ledger"]["eval"])

    def work(self) -> None:
        """Send the records until the run has ended, then the files; report how it went."""
        if self._attempt(self._start):
            while True:
                ending = self.ending.is_set()  # before the last look at the log
                self._send()
                if ending:
                    break
                self.ending.wait(POLL_S)
        uploaded = self._end() if self._tracker is not None else None
        self._save(force=True)
        self._pending.read(reopen=not self.orphaned)
        self._report("end", **self._sent, left=self._pending.steps, why=self._why, uploaded=uploaded)

    def _start(self) -> None:
        table = self._trackers.TABLE[self._name]
        if self._tracker is None:  # else only the rest has failed before
            self._tracker = self._trackers.start(self._job)
            self._state = self._state._replace(id=table.run_id(self._tracker))
            self._save(force=True)
        ignore_signals()  # libraries install handlers
        table.send_config(self._job, self._tracker, self._config)
        self._state = self._state._replace(configured=True)
        self._save(force=True)
        self._report("ready", place=table.place(self._job, self._tracker), resumed=self._job.run_id is not None)

    def _send(self) -> None:
        self._pending.read(reopen=not self.orphaned)
        whole = self.ending.is_set() and self.status == "finished"
        while (record := self._pending.next(whole=whole)) is not None:
            step, kind = mark_of(record)
            if not self._attempt(partial(self._tracker.log, values_of(record), step=step)):
                return  # the run has ended: it stays for the next start
            self._pending.remove()
            self._state = self._state._replace(mark=(step, kind))
            self._sent["evaluations" if kind else "steps"] += 1
            self._save()
            self._pending.read(reopen=not self.orphaned)

    def _end(self) -> list[str] | None:
        """Upload the files and end the tracked run; return the names of the files, None if none were to be sent."""
        table, names = self._trackers.TABLE[self._name], None
        if self._job.spec.artifacts and self.status == "finished" and table.upload is not None:
            with tempfile.TemporaryDirectory(prefix="lora-tracking-") as folder:
                # Named for the run's files, and kept until the tracked run has ended: some are read only then.
                files = Path(folder) / "run"
                files.mkdir()
                names = write_artifacts(self._run, self._config, files)
                upload = table.upload
                if not self._attempt(lambda: upload(self._job, self._tracker, files)):
                    names = []
                self._attempt(lambda: table.finish(self._tracker, self.status))
                return names
        self._attempt(lambda: table.finish(self._tracker, self.status))
        return names

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Call a library, again after pauses until it succeeds, or has failed after the run has ended.

        The first failure is told. Nothing is left out because it fails: every record has the same form, so what fails
        is the connection or the login, and a later record would fail too.
        """
        for pause in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
            ended = self.ending.is_set()
            with library_errors() as errors:
                call()
            if not errors.found:
                return True
            self._why = describe_failure(errors.found[0])
            print(f"{time.strftime('%F %T')} {self._why}", flush=True)
            if not self._told:
                self._told = True
                self._report("problem", text=self._why)
            if ended:
                break
            self.ending.wait(pause)
        return False

    def _save(self, *, force: bool = False) -> None:
        if self._state.id is None or not (force or time.monotonic() > self._saved_at + SAVE_S):
            return
        if in_place(self._state_file.with_suffix(".log")):
            atomic.write_json(self._state_file, self._state.to_json())
        self._saved_at = time.monotonic()


class library_errors:  # used like a function: `with library_errors() as errors:`
    """Context manager that keeps what a tracker's library raises: any exception, and the exit of one without a login.

    A class, as `except Exception` would hide the bugs of this program in other places.
    """

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception | SystemExit):
            return False
        traceback.print_exception(error)  # in the log of the tracker
        self.found.append(error)
        return True


def describe_failure(error: BaseException) -> str:
    """Return an exception as one line without folders of this machine: `ConnectionError: ...`."""
    text = redact_text(first_line(error)).rstrip(".") if str(error) else "no message"
    return f"{type(error).__name__}: {text[:200]}"


def write_artifacts(run: RunFolder, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write what a tracker stores of a finished run into `folder`, without paths of this machine; return the names."""
    texts: dict[str, Callable[[], str]] = {
        "README.md": lambda: (run.adapter / "README.md").read_text(encoding="utf-8"),
        "recipe.yaml": lambda: dump_values(config["recipe"]),
        "manifest.json": lambda: json.dumps(
            redact_values(without_private(json.loads(run.manifest.read_text()))), indent=2
        ),
        "metrics.jsonl": lambda: run.metrics.read_text(encoding="utf-8"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text(), encoding="utf-8")
    return list(texts)


def ignore_signals() -> None:
    """Ignore the signals that end a run: its process decides what happens, and a closed pipe tells this one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def in_place(log: Path) -> bool:
    """Return whether the log that stdout goes to is still there: --fresh may have moved the run away."""
    try:
        return os.path.samestat(os.fstat(1), os.stat(log))
    except OSError:
        return False


@contextlib.contextmanager
def locked(log: Path) -> Iterator[None]:
    """Within the block, let no other process track this run with this tracker; wait for one that still does."""
    with open(log, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def main() -> None:
    """Track the run that the first line of stdin describes, until stdin says how it ended, or is closed."""
    ignore_signals()
    request = json.loads(sys.stdin.buffer.readline())
    reports = os.dup(1)  # what libraries print goes to a log instead

    def report(event: str, **values: Any) -> None:
        with contextlib.suppress(OSError):  # the training process has ended
            os.write(reports, json.dumps({"event": event, **values}).encode() + b"\n")

    log = Path(request["run"]) / "tracking" / f"{request['tracker']}.log"
    with locked(log):
        sender = Sender(request, report)
        limit = float(request["spec"]["timeout_seconds"])
        threading.Thread(target=_wait_for_end, args=(sender, limit), daemon=True).start()
        sender.work()
        # Without the handlers of libraries, which may wait for their servers: all was sent, or the time is up.
        os._exit(0)


def _wait_for_end(sender: Sender, limit: float) -> None:
    """Tell the sender how the run ended, and end this process after `limit` seconds from then."""
    line = sys.stdin.buffer.readline().decode().strip()
    if line in ("finished", "stopped", "failed"):
        sender.status = line  # type: ignore[assignment]  # one of Status
    else:
        sender.orphaned = True
    sender.ending.set()
    time.sleep(limit)
    os._exit(1)


if __name__ == "__main__":
    main()
