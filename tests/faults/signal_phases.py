"""Signals in each phase of each command: where they are sent, and what must be true afterwards.

A phase begins when a line appears on stderr, or a file in the working folder. `send_in_phase` starts the command, sends
one or two signals in the phase, and `find_problems` tells what was wrong with its end. Used by the tests and by
campaigns that send many signals at random moments (`send_at`).
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.warm_lora import Running, WarmLora

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S = 60.0  # seconds that a command may take to end on a busy machine: a step and a save take milliseconds here
# Texts of tracebacks, and of exceptions that Python drops, in any process or thread.
UNCLEAN = ("Traceback", "Exception ignored", "KeyboardInterrupt", "Aborted", "leaked semaphore", "Fatal Python error")

Begun = Callable[[Running], bool]  # whether the phase has begun


class Phase(NamedTuple):
    """A phase of a command."""

    command: str  # train, merge, ...
    name: str
    arguments: tuple[str, ...]
    begun: Begun
    training: bool = False  # the first signal may stop the run after the current step, which is saved


class End(NamedTuple):
    """How a command ended after one or two signals."""

    code: int
    sent: tuple[signal.Signals, ...]
    seconds: float  # from the first signal to the end
    out: str
    err: str
    leftovers: tuple[str, ...]  # temporary paths in the working folder

    @property
    def last_line(self) -> str:
        """The last line of stderr."""
        return (self.err.splitlines() or [""])[-1]


def line(text: str) -> Begun:
    """Return whether stderr contains `text`."""
    return lambda running: text in running.messages()


def path(pattern: str) -> Begun:
    """Return whether a path in the working folder matches the glob `pattern`."""
    return lambda running: next(running.folder.glob(pattern), None) is not None


def started() -> Begun:
    """Return a phase that begins with the process."""
    return lambda running: True


TRAIN = ("train", "recipe.yaml")
MERGE = ("merge", "runs/a", "--out", "out")
EXPORTS = {"safetensors": "out", "peft": "out", "vllm": "out", "ollama": "out", "onnx": "out"}
EXPORTS |= {"gguf": "out.gguf", "gguf-adapter": "out.gguf"}  # --out of each format


def export_phases(to: str, out: str) -> list[Phase]:
    """Return the phases of an export."""
    arguments = ("export", "runs/a", "--to", to, "--out", out)
    begun = {"start": started(), "write": line(f"writing {to}"), "files": path(f".tmp-{out}-*/*/*")}
    return [Phase("export", f"{to} {name}", arguments, each) for name, each in begun.items()]


# The working folder has recipe.yaml, for all commands except train a finished run in runs/a, and for the conversions
# their sources.
PHASES = [
    Phase("train", "start", TRAIN, started()),
    Phase("train", "encoding", (*TRAIN, "--set", "data.max_length=100"), line("encoding")),
    Phase("train", "model", TRAIN, line("of each batch is tokens")),
    # It is short, so that the signal may arrive in step 1.
    Phase("train", "base evaluation", TRAIN, line("measuring the base"), training=True),
    Phase("train", "step", TRAIN, line("step 2/"), training=True),
    Phase("train", "evaluation", TRAIN, line("eval at step 4"), training=True),
    Phase("train", "save", TRAIN, path("runs/a/checkpoints/.tmp-*"), training=True),
    Phase("train", "proof", TRAIN, path("runs/a/.tmp-adapter-*")),
    Phase("merge", "start", MERGE, started()),
    Phase("merge", "write", MERGE, path(".tmp-out-*")),
    Phase("merge", "tensors", MERGE, path(".tmp-out-*/out/*.safetensors")),
    Phase("merge", "proof", MERGE, path(".tmp-out-*/out/README.md")),
    *(phase for to, out in EXPORTS.items() for phase in export_phases(to, out)),
    Phase("eval", "start", ("eval", "runs/a"), started()),
    Phase("eval", "measure", ("eval", "runs/a"), line("measuring base")),
    Phase("eval", "adapter", ("eval", "runs/a"), line("measuring adapter")),
    Phase("check", "start", ("check", "recipe.yaml"), started()),
    Phase("check", "encoding", ("check", "recipe.yaml", "--set", "data.max_length=99"), line("encoding")),
    Phase("chat", "start", ("chat", "runs/a"), started()),
    Phase("adapter", "inspect", ("adapter", "inspect", "runs/a"), started()),
    Phase("adapter", "resize", ("adapter", "resize", "runs/a", "--rank", "2", "--out", "out"), path(".tmp-out-*")),
    Phase("adapter", "convert", ("adapter", "convert", "pickled-a", "--out", "out"), path(".tmp-out-*")),
    Phase("convert", "start", ("convert", "train.sh", "--out", "out.yaml"), started()),
    Phase("adapter", "combine", ("adapter", "combine", "runs/a", "0.5*runs/a", "--out", "out"), path(".tmp-out-*")),
]


def send_in_phase(
    lora: WarmLora,
    phase: Phase,
    folder: Path,
    numbers: Sequence[signal.Signals],
    *,
    environment: Mapping[str, str] | None = None,
    ignored: Sequence[signal.Signals] = (),
) -> End | None:
    """Run the command of `phase` in `folder` and send it `numbers`, one after the other, when the phase begins.

    Args:
        lora: starts the command.
        phase: of the command.
        folder: with the files that PHASES needs.
        numbers: of the signals.
        environment: variables of the command.
        ignored: signals that it ignores from its start, as under `nohup`.

    Returns:
        How it ended; None if it ended before the phase began (campaigns count that as not tried).
    """
    setup = "".join(f"signal.signal({int(number)}, signal.SIG_IGN);" for number in ignored)
    running = lora.start(phase.arguments, folder, environment=environment, setup=setup)
    while not phase.begun(running):
        if lora.poll(running) is not None:
            return None
        time.sleep(0.001)
    return _send(lora, running, numbers)


def send_at(
    lora: WarmLora, arguments: Sequence[str], folder: Path, seconds: float, numbers: Sequence[signal.Signals]
) -> End | None:
    """Run a command and send `numbers` after `seconds`; return how it ended, or None if it ended before."""
    running = lora.start(arguments, folder)
    time.sleep(seconds)
    return None if lora.poll(running) is not None else _send(lora, running, numbers)


def _send(lora: WarmLora, running: Running, numbers: Sequence[signal.Signals]) -> End:
    start = time.monotonic()
    for number in numbers:
        if lora.poll(running) is None:
            os.kill(running.pid, number)
    code = lora.wait(running, seconds=END_S)
    seconds = time.monotonic() - start
    found = tuple(str(entry.relative_to(running.folder)) for entry in running.folder.rglob(".tmp-*"))
    out, err = running.out.read_text(errors="replace"), running.messages()
    return End(code, tuple(numbers), seconds, out, err, found)


def find_problems(end: End, *, training: bool = False) -> list[str]:
    """Return what is wrong with the end of a command: wrong exit code, traceback, leftovers, no line that tells why.

    Args:
        end: of the command.
        training: whether the run may have been saved after the current step.
    """
    codes = {128 + number for number in end.sent}
    problems = []
    if end.code == 0:  # it was done before the signal arrived
        return [f"leftovers: {', '.join(end.leftovers)}"] if end.leftovers else []
    if -end.code in end.sent:
        pass  # before Python had started, or after the command was done
    elif end.code not in codes:
        problems.append(f"exit code {end.code}, expected {sorted(codes)}")
    elif not any(end.last_line == f"stopped by {number.name}" for number in end.sent) and not (
        training and end.last_line.startswith("stopped after step ")
    ):
        problems.append(f"last line: {end.last_line!r}")
    problems += [f"stderr: {text}" for text in UNCLEAN if text in end.err or text in end.out]
    if end.leftovers:
        problems.append(f"leftovers: {', '.join(end.leftovers)}")
    return problems
