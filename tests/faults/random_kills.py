"""SIGKILL to training at random moments, also to its resumption, until it is done: the adapter is that of one run.

prepare(folder)             the uninterrupted runs
cases(seed, folder)         kills of one process; an endless series
cases_of_two(seed, folder)  kills of the launcher or a worker of a run with two processes
try_case(case, folder)
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from tests.faults import forked_lora, workplace
from tests.faults.campaign import Outcome
from tests.faults.scenarios import find_problem_of_run
from tests.faults.workplace import Contents, contents, difference

RUN = "runs/new"
RECIPES = ("recipe", "best", "long", "packed", "free", "adalora")
TWO = "two"  # the recipe with two processes
STEPS = {"recipe": 4, "best": 4, "long": 12, "packed": 8, "free": 8, "adalora": 8, TWO: 8}
ORPHAN_SECONDS = 60.0  # that workers have to end after their launcher was killed


class Moment(NamedTuple):
    """When a process is killed."""

    kind: Literal["time", "step", "save", "adapter"]
    after: float  # time: share of the duration of an uninterrupted run; else seconds after the event
    step: int = 0  # the step, or the number of the save
    who: Literal["process", "launcher", "worker 0", "worker 1", "all"] = "process"

    def __str__(self) -> str:
        event = {
            "time": f"at {self.after:.0%} of its time",
            "step": f"{self.after * 1000:.0f} ms after step {self.step}",
            "save": f"{self.after * 1000:.1f} ms after the begin of save {self.step}",
            "adapter": f"{self.after * 1000:.1f} ms after the begin of writing the adapter",
        }
        return event[self.kind] if self.who == "process" else f"{self.who} {event[self.kind]}"


class Case(NamedTuple):
    """A run and the moments at which it, and then each resumption, is killed."""

    recipe: str
    moments: tuple[Moment, ...]
    cold: bool  # without encoded rows in the cache
    fresh: bool  # over an earlier run


class Reference(NamedTuple):
    """The uninterrupted run."""

    run: Contents
    checkpoints: Contents  # all of them, also pruned ones
    seconds: float


def prepare(folder: Path, recipes: Iterable[str] = RECIPES) -> None:
    """Prepare working folders, and train each of the recipes without a kill."""
    workplace.prepare(folder)
    (folder / "references").mkdir()
    for name in recipes:
        _write_reference(folder, name)


def _write_reference(folder: Path, name: str) -> None:
    with workplace.fresh(folder) as work:
        workplace.lora(f"train {name}.yaml --set training.keep_checkpoints=99", work)
        checkpoints = contents(work / RUN / "checkpoints")
    with workplace.fresh(folder) as work:
        begin = time.monotonic()
        workplace.lora(f"train {name}.yaml", work)
        reference = Reference(contents(work / RUN), checkpoints, time.monotonic() - begin)
    (folder / "references" / f"{name}.json").write_text(json.dumps(reference))


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield kills of runs with one process, without end."""
    rng, recipes = random.Random(seed), sorted(path.stem for path in (folder / "references").iterdir())
    while True:
        recipe = rng.choice(recipes)
        moments = [_draw_moment(rng, STEPS[recipe]) for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))]
        yield Case(recipe, tuple(moments), cold=rng.random() < 0.2, fresh=rng.random() < 0.15)


def cases_of_two(seed: int, folder: Path) -> Iterator[Case]:
    """Yield kills of a run with two processes, without end."""
    rng = random.Random(seed)
    while True:
        moment = _draw_moment(rng, STEPS[TWO])
        while moment.kind == "time":  # mostly spent in imports
            moment = _draw_moment(rng, STEPS[TWO])
        who = rng.choice(["launcher", "worker 0", "worker 1", "all"])
        yield Case(TWO, (moment._replace(who=who),), cold=False, fresh=False)


def _draw_moment(rng: random.Random, steps: int) -> Moment:
    roll = rng.random()
    if roll < 0.3:
        return Moment("time", rng.random())
    if roll < 0.6:
        return Moment("step", rng.random() * 0.1, rng.randrange(1, steps + 1))
    if roll < 0.9:
        return Moment("save", rng.random() ** 2 * 0.05, rng.randrange(1, steps // 2 + 1))
    return Moment("adapter", rng.random() ** 2 * 0.05)


def try_case(case: Case, folder: Path) -> Outcome:
    """Kill a run and its resumptions at the moments of `case`, then resume it to the end and compare it."""
    described = f"lora train {case.recipe}.yaml{' --fresh' * case.fresh}, killed {'; '.join(map(str, case.moments))}"
    reference = Reference(*json.loads((folder / "references" / f"{case.recipe}.json").read_text()))
    with workplace.fresh(folder) as work:
        if case.cold:
            workplace.remove_cache(work)
        old: Contents = {}
        if case.fresh:
            (work / "runs/a").rename(work / RUN)
            old = contents(work / RUN)
        kills, flag = 0, " --fresh" if case.fresh else ""
        try:
            for moment in case.moments:
                killed, ended = _kill(f"train {case.recipe}.yaml{flag}", work, moment, reference.seconds)
                kills += killed
                if problem := _find_problem(work, ended, reference, old, killed=killed):
                    return problem._replace(fault=described)
                flag = _next_flag(work, flag)
            ended = forked_lora.run(
                f"train {case.recipe}.yaml{flag}".split(), work, environment=workplace.environment(work)
            )
        except TimeoutError as error:
            return Outcome("hang", described, str(error))
        if not kills:
            return Outcome("not tried", described)
        if problem := _find_problem(work, ended, reference, old, killed=False):
            return problem._replace(fault=described)
        if ended.code:
            return Outcome("lost", described, f"the run cannot go on: {ended.last_lines}")
        found = {path: digest for path, digest in contents(work / RUN).items() if not path.startswith("earlier-")}
        if changed := difference(found, reference.run):
            return Outcome("lost", described, f"the finished run is another one: {changed}")
        if left := workplace.leftovers(work):
            return Outcome("lost", described, f"leftovers: {', '.join(left)}")
        return Outcome("survived", described)


def _next_flag(work: Path, flag: str) -> str:
    """Return the option that a user would take: --resume once there is something of the new run."""
    if flag == " --fresh":  # the recipe is written once the earlier run is aside
        moved = (work / RUN / "earlier-1" / "recipe.yaml").exists()
        return " --resume" if moved and (work / RUN / "recipe.yaml").exists() else flag
    return " --resume" if (work / RUN / "recipe.yaml").exists() else ""


def _find_problem(
    work: Path, ended: forked_lora.Ended, reference: Reference, old: Contents, *, killed: bool
) -> Outcome | None:
    if ended.traceback and not killed:
        return Outcome("traceback", "", ended.traceback)
    if problem := find_problem_of_run(contents(work / RUN), old, reference.run, reference.checkpoints):
        return Outcome("lost", "", problem)
    if orphans := _wait_for_orphans(work):
        return Outcome("hang", "", f"left running: {', '.join(orphans)}")
    return None


def _kill(command: str, work: Path, moment: Moment, seconds: float) -> tuple[bool, forked_lora.Ended]:
    """Start a command and kill it at a moment; return whether it was still running, and its end."""
    running = forked_lora.start(command.split(), work, environment=workplace.environment(work))
    code, seen, saves = None, False, 0
    while code is None and time.monotonic() < running.begin + forked_lora.SECONDS:
        if moment.kind == "time":
            begun = time.monotonic() > running.begin + moment.after * seconds
        elif moment.kind == "step":
            begun = _steps_done(work / RUN / "metrics.jsonl") >= moment.step
        elif moment.kind == "adapter":
            begun = any((work / RUN).glob(".tmp-adapter-*"))
        else:
            now = any((work / RUN / "checkpoints").glob(".tmp-*"))
            saves, seen = saves + (now and not seen), now
            begun = saves >= moment.step
        if begun:
            time.sleep(0 if moment.kind == "time" else moment.after)
            _send_sigkill(running.pid, moment)
            return True, forked_lora.wait(running)
        time.sleep(0.0005)
        code = forked_lora.poll(running)
    if code is None:
        return False, forked_lora.wait(running, seconds=0)
    return False, forked_lora.finish(running, code)


def _send_sigkill(pid: int, moment: Moment) -> None:
    workers = psutil.Process(pid).children(recursive=True) if moment.who not in ("process", "launcher") else []
    ranks = sorted((child for child in workers if "RANK" in child.environ()), key=lambda child: child.environ()["RANK"])
    victims = {"worker 0": ranks[:1], "worker 1": ranks[1:2], "all": workers}.get(moment.who, [])
    if moment.who in ("process", "launcher", "all"):
        os.kill(pid, signal.SIGKILL)
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()


def _steps_done(metrics: Path) -> int:
    try:
        return metrics.read_bytes().count(b'"loss"')
    except OSError:
        return 0


def _wait_for_orphans(work: Path) -> list[str]:
    """Wait until no process has the working folder; return those that stay, after killing them."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (orphans := _processes_in(work)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in orphans:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return [" ".join(process.cmdline()[:6]) if process.is_running() else "gone" for process in orphans]


def _processes_in(work: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd().startswith(str(work)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
