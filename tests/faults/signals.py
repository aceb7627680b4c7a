"""SIGINT, SIGTERM and SIGHUP in every phase of every command, and at random moments; also two signals, and `nohup`.

Each command ends with its code and one line; no file is half; the next command gives what it gives without a signal.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tests.commands.conftest import write_recipe
from tests.faults import forked_lora, workplace
from tests.faults.campaign import Outcome
from tests.faults.signal_phases import PHASES, SIGNALS, End, Phase, find_problems, send_at, send_in_phase
from tests.faults.workplace import Contents, contents, difference
from tests.support import warm_lora

BY_NAME = {f"{phase.command} {phase.name}": phase for phase in PHASES}
STOPPING = (signal.SIGINT, signal.SIGHUP)  # that `nohup` and scripts let a command ignore
# Signals that are sent one after the other, and those that the command ignores from its start.
SENT = (
    *(((number,), ()) for number in SIGNALS),
    ((signal.SIGINT, signal.SIGINT), ()),
    ((signal.SIGTERM, signal.SIGINT), ()),
    ((*STOPPING, signal.SIGTERM), STOPPING),
)
RUN = "runs/a"


class Case(NamedTuple):
    """A phase, and the signals in it."""

    phase: str  # of BY_NAME
    numbers: tuple[int, ...]
    ignored: tuple[int, ...]
    seconds: float | None = None  # after the start, in place of the phase


class ForkingLora(warm_lora.WarmLora):
    """The client whose server is this process itself, which has imported the libraries."""

    def __init__(self) -> None:
        self._codes = {}

    def _ask(self, request: Mapping[str, object]) -> Any:
        if "poll" in request:
            assert isinstance(request["poll"], int)
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if pid else None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return pid
        code: object = 1
        try:
            warm_lora.become_lora(dict(request))
            code = 0
        except SystemExit as wish:
            code = wish.code or 0
        finally:
            os._exit(code if isinstance(code, int) else 1)


def prepare(folder: Path) -> None:
    """Prepare working folders with the recipe that the phases need, and train it without a signal, in each form."""
    workplace.prepare(folder)
    changes = {"training.max_steps": 12, "training.save_every": 6, "training.eval_every": 4, "output": RUN}
    write_recipe(folder / "template" / "recipe.yaml", changes)
    runs = {}
    for command in {" ".join(phase.arguments) for phase in BY_NAME.values() if phase.command == "train"}:
        with workplace.fresh(folder) as work:
            shutil.rmtree(work / RUN)
            workplace.lora(command, work)
            runs[command] = _result(work)
    (folder / "runs.json").write_text(json.dumps(runs))


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield each phase with each of SENT in random order, then signals at random moments without end."""
    rng = random.Random(seed)
    everything = [Case(name, *sent) for name, sent in product(BY_NAME, SENT)]
    rng.shuffle(everything)
    yield from everything
    while True:
        yield Case(rng.choice(list(BY_NAME)), *rng.choice(SENT), seconds=rng.random() * 2)


def try_case(case: Case, folder: Path) -> Outcome:
    """Send the signals of `case` to its command, and run the next command."""
    phase, numbers = BY_NAME[case.phase], [signal.Signals(number) for number in case.numbers]
    place = case.phase if case.seconds is None else f"{phase.command}, after {case.seconds:.2f} s"
    described = f"lora {' '.join(phase.arguments)}: {', '.join(number.name for number in numbers)} in {place}"
    described += f", ignoring {', '.join(signal.Signals(number).name for number in case.ignored)}" * bool(case.ignored)
    with workplace.fresh(folder) as work:
        if phase.command == "train":
            shutil.rmtree(work / RUN)
        try:
            end = _send(case, phase, work, numbers)
            if end is None:
                return Outcome("not tried", described)
            if problems := find_problems(end, training=phase.command == "train"):
                verdict = "traceback" if any("stderr" in problem for problem in problems) else "lost"
                return Outcome(verdict, described, f"{'; '.join(problems)}; stderr: {end.err[-600:]}")
            runs = json.loads((folder / "runs.json").read_text())
            problem = _find_problem_after(phase, work, runs.get(" ".join(phase.arguments), {}), end)
        except TimeoutError as error:
            return Outcome("hang", described, str(error))
        return Outcome("lost", described, problem) if problem else Outcome("survived", described)


def _send(case: Case, phase: Phase, work: Path, numbers: list[signal.Signals]) -> End | None:
    os.environ.update(workplace.environment(work))
    lora = ForkingLora()
    if case.seconds is not None and not case.ignored:
        return send_at(lora, phase.arguments, work, case.seconds, numbers)
    ignored = [signal.Signals(number) for number in case.ignored]
    return send_in_phase(lora, phase, work, numbers, ignored=ignored)


def _result(work: Path) -> Contents:
    """Return the contents of the finished run, with the last of its checkpoints: a signal makes another one before."""
    found = contents(work / RUN)
    last = max((path.split("/")[1] for path in found if path.startswith("checkpoints/")), default="")
    return {path: digest for path, digest in found.items() if path.split("/")[0] != "checkpoints" or last in path}


def _find_problem_after(phase: Phase, work: Path, run: Contents, end: End) -> str:
    """Run the next command, and return what is not as it must be."""
    out = work / phase.arguments[phase.arguments.index("--out") + 1] if "--out" in phase.arguments else None
    if out is not None and end.code and out.exists():
        return f"{out.name} is there, although the command was ended"
    resume = ["--resume"] if phase.command == "train" and (work / RUN / "recipe.yaml").exists() else []
    if out is None or not out.exists():
        again = forked_lora.run([*phase.arguments, *resume], work, environment=workplace.environment(work))
        if again.code:
            return f"the next command fails: {again.last_lines}"
    if phase.command == "train" and (changed := difference(_result(work), run)):
        return f"the finished run is another one: {changed}"
    left = workplace.leftovers(work)
    return f"leftovers after the next command: {', '.join(left)}" if left else ""
