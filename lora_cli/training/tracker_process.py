"""The process of one experiment tracker: follows metrics.jsonl of a run, and sends each step and evaluation.

A process of its own, because trackers block, patch other libraries, install handlers of signals and of the exit, run
threads, close files and fork; here none of that touches training. The metrics log is its buffer: what a tracker cannot
take now is read and sent later, also by a resumed run. `training/tracking.py` starts this process, and shares memory
with it; after the start, nothing here depends on an open file.
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_cli.errors import first_line, one_line
from lora_cli.recipe.dump import dump_values
from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec
from lora_cli.run import atomic
from lora_cli.run.folder import RunFolder
from lora_cli.run.quick_imports import quick_imports
from lora_cli.run.redact import redact_secrets, redact_text, redact_values, without_private
from lora_cli.run.signals import SIGNALS
from lora_cli.training.tracked_records import Counts, Pending, State, mark_of, read_state, values_of
from lora_cli.training.tracker_channel import Channel
from lora_cli.training.tracker_job import Job, Status
from lora_cli.training.tracker_log import drop_output, start_log

POLL_S = 0.5  # seconds between two looks at the metrics log
WATCH_S = 0.05  # seconds between two looks whether the run has ended
LATE_S = 5  # seconds after its time in which the training process has to end this one
SAVE_S = 1.0  # seconds between two writes of the state
PAUSES_S = (1, 2, 4, 8, 15, 30)  # before a call that has failed is tried again; the last one is repeated
MAX_TRACE = 20_000  # characters of a traceback in the log, which has one where the failure changes
MAX_FAILURE = 200  # characters of a library's message in the terminal
MAX_PLACE = 1000  # characters of an address
NICENESS = 10  # training goes first on a busy machine


class Ending:
    """How the run ends, as a thread sees it, which ends this process if it takes too long then."""

    def __init__(self, channel: Channel, *, training: int, limit: float) -> None:
        """`training` is the process of the run; `limit` is the time that is left after its end, in seconds."""
        self.event = threading.Event()  # set when the run has ended
        self.status: Status = "failed"
        self.orphaned = False  # the training process has ended, and its run folder may be another run's
        threading.Thread(target=self._watch, args=(channel, training, limit), daemon=True).start()

    def _watch(self, channel: Channel, training: int, limit: float) -> None:
        while channel.status is None and os.getppid() == training:
            time.sleep(WATCH_S)
        self.orphaned = channel.status is None
        self.status = channel.status or "failed"
        self.event.set()
        time.sleep(limit + (0 if self.orphaned else LATE_S))
        if os.getpgrp() == os.getpid():  # with the processes that libraries have started
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


class Log:
    """What this program itself writes to the log of a tracker: by its path, as libraries close files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with suppress(OSError):
            self._stat = path.stat()

    def in_place(self) -> bool:
        """Return whether the log is still there: --fresh may have moved the run away."""
        try:
            return os.path.samestat(self._stat, self._path.stat())
        except (OSError, AttributeError):
            return False

    def write(self, text: str) -> None:
        """Add lines, without secrets. What cannot be written is lost: the terminal has the first failure."""
        if self.in_place():
            with suppress(OSError), self._path.open("ab", buffering=0) as file:
                file.write(redact_secrets(f"{time.strftime('%F %T')} {text.rstrip()}\n").encode(errors="replace"))


class Sender:
    """One tracker at work. What its library raises is tried again, then counted; nothing of it gets out."""

    def __init__(self, request: Mapping[str, Any], channel: Channel, ending: Ending, log: Log) -> None:
        """`request` is that of `training/tracking.py`."""
        with quick_imports():  # of torch and Accelerate: seconds, in which signals are ignored already
            from lora_cli.training import trackers

        self._trackers = trackers
        run = RunFolder(Path(request["folder"]), -1)
        self._name: TrackerName = request["tracker"]
        self._state_file = run.tracking / f"{self._name}.json"
        self._config = json.loads((run.tracking / "config.json").read_text(encoding="utf-8"))
        state = read_state(self._state_file)
        spec = TrackingSpec.model_validate(request["spec"])
        self._job = Job(
            tracker=self._name,
            spec=spec,
            run=Path(request["run"]),
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
        self._state, self._run = state, run
        self._channel, self._ending, self._log = channel, ending, log
        self._saved_at = 0.0
        self._sent = Counts(0, 0)
        self._tracker: Any = None
        self._why = ""
        self._told: set[str] = set()
        self._pid = os.getpid()
        self._pending = Pending(run.metrics, state.mark, self._awaits_evaluation)
        channel.record_sent(state.mark, self._sent)

    def _awaits_evaluation(self, step: int) -> bool:
        every = self._config["recipe"]["training"]["eval_every"]
        due = step == self._config["steps"] or (every is not None and step % every == 0)
        return due and bool(self._config["ledger"]["eval"])

    def work(self) -> None:
        """Send the records until the run has ended, then the files; report how it went."""
        if self._attempt(self._start):
            while True:
                ending = self._ending.event.is_set()  # before the last look at the log
                self._send()
                if ending:
                    break
                self._ending.event.wait(POLL_S)
        files = self._end() if self._tracker is not None else {}
        self._save(force=True)
        self._read()
        self._channel.report("end", left=self._pending.left, why=self._why, **files)

    def _start(self) -> None:
        table = self._trackers.TABLE[self._name]
        if self._tracker is None:  # else only the rest has failed before
            self._tracker = self._trackers.start(self._job)
            self._end_copy()
            self._state = self._state._replace(id=table.run_id(self._tracker))
            self._save(force=True)
        ignore_signals()  # libraries install handlers
        table.send_config(self._job, self._tracker, self._config)
        self._state = self._state._replace(configured=True)
        self._save(force=True)
        place = table.place(self._job, self._tracker)
        self._channel.report("ready", place=one_line(place, limit=MAX_PLACE), resumed=self._job.run_id is not None)

    def _send(self) -> None:
        self._read()
        whole = self._ending.event.is_set() and self._ending.status == "finished"
        while (record := self._pending.next(whole=whole)) is not None:
            step, kind = mark_of(record)
            if not self._attempt(partial(self._tracker.log, values_of(record), step=step)):
                return  # the run has ended: it stays for the next start
            self._why = ""
            self._pending.remove()
            self._state = self._state._replace(mark=(step, kind))
            self._sent = Counts(self._sent.steps + 1 - kind, self._sent.evaluations + kind)
            self._channel.record_sent((step, kind), self._sent)
            self._save()
            self._read()

    def _read(self) -> None:
        with self._tell_failure("metrics.jsonl cannot be read"):
            self._pending.read(reopen=not self._ending.orphaned)

    def _end(self) -> dict[str, Any]:
        """Upload the files and end the tracked run; return which files were sent, and which ones could not be read."""
        table, status, files = self._trackers.TABLE[self._name], self._ending.status, dict[str, Any]()
        # Files are named for those of the run, and kept until the tracked run has ended: some are read only then.
        with ExitStack() as stack:
            if self._job.spec.artifacts and status == "finished" and table.upload is not None:
                files = {"uploaded": [], "unreadable": []}
                with self._tell_failure("the files cannot be copied"):
                    folder = stack.enter_context(temporary_folder())
                    names, files["unreadable"] = write_artifacts(self._run, self._config, folder)
                    upload = partial(table.upload, self._job, self._tracker, folder)
                    files["uploaded"] = names if names and self._attempt(upload) else []
            self._attempt(lambda: table.finish(self._tracker, status))
        return files

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Call a library, again after pauses until it succeeds, or has failed after the run has ended.

        The first failure is told. Nothing is left out because it fails: every record has the same form, so what fails
        is the connection or the login, and a later record would fail too.
        """
        for pause in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
            ended = self._ending.event.is_set()
            with library_errors() as errors:
                call()
            self._end_copy()
            if not errors.found:
                return True
            why = describe_failure(errors.found[0])
            trace = "".join(traceback.format_exception(errors.found[0]))
            trace = redact_secrets(trace[: 2 * MAX_TRACE])[:MAX_TRACE]  # not cut within a secret
            self._log.write(why if why == self._why else f"{trace}\n{why}")
            self._why = why
            self._tell("problem", why, about="problem")
            if ended:
                break
            self._ending.event.wait(pause)
        return False

    def _end_copy(self) -> None:
        """End this process if the library has forked, and the program goes on in the copy too."""
        if os.getpid() != self._pid:
            os._exit(0)

    def _tell(self, event: str, text: str, *, about: str) -> None:
        """Let the training process print a text; once only for what it is about."""
        if about not in self._told:
            self._told.add(about)
            self._channel.report(event, text=text)

    @contextmanager
    def _tell_failure(self, what: str) -> Iterator[None]:
        """Tell an error of the operating system in the block, such as a full disk, and go on."""
        try:
            yield
        except OSError as error:
            text = f"{what}: {error.strerror or first_line(error)}"
            self._log.write(text)
            self._why = self._why or text
            self._tell("note", text, about=what)

    def _save(self, *, force: bool = False) -> None:
        if self._state.id is None or not (force or time.monotonic() > self._saved_at + SAVE_S):
            return
        if self._log.in_place():
            with self._tell_failure(f"{self._state_file.name} cannot be written"):
                atomic.write_json(self._state_file, self._state.to_json())
        self._saved_at = time.monotonic()


class library_errors:  # used like a function: `with library_errors() as errors:`
    """Context manager that keeps what a tracker's library raises: any exception, and the exit of one without a login.

    A class, as `except BaseException` would hide the bugs of this program in other places.
    """

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.found += [] if error is None else [error]
        return True


def describe_failure(error: BaseException) -> str:
    """Return an exception as one line without secrets and folders of this machine: `ConnectionError: ...`."""
    message = ""
    with library_errors():  # its own method may fail
        message = str(error)
    # Redacted before it is cut: half of a secret would not be found.
    line = next(iter(message[:MAX_TRACE].splitlines()), "")
    text = redact_secrets(redact_text(line)).strip().rstrip(".") or "no message"
    return f"{type(error).__name__}: {one_line(text, limit=MAX_FAILURE)}"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder named like a run, for the files that are sent."""
    with tempfile.TemporaryDirectory(prefix="lora-tracking-", ignore_cleanup_errors=True) as folder:
        files = Path(folder) / "run"
        files.mkdir()
        yield files


def write_artifacts(run: RunFolder, config: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """Write what a tracker stores of a finished run into `folder`, without paths of this machine.

    Returns:
        The names of the files, and those of files that are missing, damaged or cannot be read.

    Raises:
        OSError: `folder` cannot be written.
    """
    texts: dict[str, Callable[[], str]] = {
        "README.md": lambda: (run.adapter / "README.md").read_text(encoding="utf-8"),
        "recipe.yaml": lambda: dump_values(config["recipe"]),
        "manifest.json": lambda: json.dumps(
            redact_values(without_private(json.loads(run.manifest.read_text()))), indent=2
        ),
        "metrics.jsonl": lambda: run.metrics.read_text(encoding="utf-8"),
    }
    names, unreadable = list[str](), list[str]()
    for name, text in texts.items():
        try:
            found = text()
        except (OSError, ValueError):
            unreadable.append(name)
            continue
        (folder / name).write_text(found, encoding="utf-8")
        names.append(name)
    return names, unreadable


def ignore_signals() -> None:
    """Ignore the signals that end a run: its process decides what happens, and its end tells this one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def main() -> None:
    """Track the run that the shared memory describes, whose descriptor is the last argument."""
    ignore_signals()
    descriptor = int(sys.argv[-1])
    channel = Channel(descriptor)
    os.close(descriptor)
    request = channel.request()
    be_nice()
    ending = Ending(channel, training=int(request["pid"]), limit=float(request["spec"]["timeout_seconds"]))
    path = Path(request["folder"]) / "tracking" / f"{request['tracker']}.log"
    try:
        start_log(path, partial(channel.report, "note", text="it waits for its process of an earlier start"))
    except OSError as error:
        drop_output()
        channel.report("note", text=f"{path.name} cannot be written: {error.strerror}")
    Sender(request, channel, ending, Log(path)).work()
    # Without the handlers of libraries, which may wait for their servers: all was sent, or the time is up.
    os._exit(0)


def be_nice() -> None:
    """Let training go first; where Linux groups processes by session, niceness counts only between groups."""
    with suppress(OSError):
        os.nice(NICENESS)
        Path("/proc/self/autogroup").write_text(f"{NICENESS}\n")


if __name__ == "__main__":
    main()
