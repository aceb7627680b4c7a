"""Two commands at once: into one place, in one run, with one cache, or one that reads what the other replaces.

Each ends with its result or with one error; the results are those of one of the two, complete.
"""

import random
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from tests.faults import forked_lora, scenarios, workplace
from tests.faults.campaign import Outcome
from tests.faults.scenarios import SCENARIOS, Record
from tests.faults.workplace import contents

PRUNE = "cache --prune --older-than 0"  # it, and what goes on beside it, never fail because of the other
# A command that writes to a run or a result, and one that reads it or writes to it, too. The run runs/b is finished.
PAIRS = (
    ("train recipe.yaml", "train recipe.yaml"),
    ("train recipe.yaml", "train recipe.yaml --fresh"),
    ("train recipe.yaml", "train recipe.yaml --resume"),
    ("train recipe.yaml", "train best.yaml --output runs/other"),
    ("train recipe.yaml", "eval runs/new"),
    ("train recipe.yaml", "check recipe.yaml"),
    *(("train b.yaml --fresh", command) for command in (
        "train b.yaml --fresh", "train b.yaml --resume", "eval runs/b --json out.json", "adapter inspect runs/b",
        "merge runs/b --out out", "export runs/b --to gguf --out out.gguf --verify file", "chat runs/b",
        "export runs/b --to peft --out out", "adapter resize runs/b --rank 2 --out out",
        "adapter combine runs/a 0.5*runs/b --out out", "train continue.yaml --set adapter.from=runs/b/adapter",
    )),
    ("merge runs/a --out out --force", "chat out --max-new-tokens 2"),
    ("merge runs/a --out out --force", "export out --to gguf --out out.gguf --verify file"),
    ("merge runs/a --out out --force", "eval runs/a --adapter merged=out"),
    ("check recipe.yaml --set data.max_length=99", "check recipe.yaml --set data.max_length=99"),
    ("train gguf.yaml --output runs/1", "train gguf.yaml --output runs/2"),
    *((command, PRUNE) for command in (
        "train recipe.yaml", "train gguf.yaml", "check recipe.yaml --set data.max_length=99", PRUNE,
    )),
)  # fmt: skip


class Case(NamedTuple):
    """Two commands and the time between their starts."""

    first: str
    second: str
    delay: float  # share of the duration of the first
    scenario: str = ""  # whose results both write; empty: no law but that of one error
    existing: bool = False  # whether there are results before


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield each pair of commands in turn, with random delays, without end."""
    rng = random.Random(seed)
    names = [
        name for name in scenarios.read_records(folder)
        if SCENARIOS[name].before and "run" not in SCENARIOS[name].results.values()
    ]  # fmt: skip
    writers = [(name, existing) for name in names for existing in (False, True)]
    rng.shuffle(writers)
    readers = rng.sample(PAIRS, len(PAIRS))
    for (name, existing), (first, second) in zip(cycle(writers), cycle(readers), strict=False):
        yield Case(SCENARIOS[name].before, SCENARIOS[name].command, rng.random() ** 2, name, existing)
        yield Case(first, second, rng.random())


def try_case(case: Case, folder: Path) -> Outcome:
    """Run the two commands of `case` in a prepared folder."""
    described = f"lora {case.first}, and after {case.delay:.0%} of its time lora {case.second}"
    described += ", over an earlier result" if case.existing else ""
    try:
        if case.scenario:
            return _try_writers(case, folder, described)
        return _try_others(case, folder, described)
    except TimeoutError as error:
        return Outcome("hang", described, str(error))


def _try_writers(case: Case, folder: Path, described: str) -> Outcome:
    record = scenarios.read_records(folder)[case.scenario]
    place = scenarios.working_folder(folder, case.scenario) if case.existing else workplace.fresh(folder)
    with place as work:
        commands = [case.first, case.second] if case.existing else [case.first, case.second.removesuffix(" --force")]
        if case.existing:
            commands[0] += " --force" if case.second.endswith("--force") else ""
        ended = _run_both(commands, work, case.delay * record.seconds)
        if problem := _find_problem_of_ends(ended, work):
            return problem._replace(fault=described)
        if all(end.code for end in ended):
            return Outcome("lost", described, f"both failed: {ended[0].last_lines}; {ended[1].last_lines}")
        if problem_of_results := _find_problem_of_results(work, case.scenario, record):
            return Outcome("lost", described, problem_of_results)
        return Outcome("survived", described)


def _find_problem_of_results(work: Path, name: str, record: Record) -> str:
    """Return how the results are those of neither command."""
    if problem := scenarios.find_problem(work, name, record):
        return problem
    missing = [result for result in SCENARIOS[name].results if not contents(work / result)]
    return f"{missing[0]} is missing" if missing else ""


def _try_others(case: Case, folder: Path, described: str) -> Outcome:
    with workplace.fresh(folder) as work:
        if "out --force" in case.first:
            workplace.lora("merge runs/b --out out", work)
        if "gguf" in case.first or "99" in case.first:
            workplace.remove_cache(work)
        ended = _run_both([case.first, case.second], work, case.delay * 1.0)
        if problem := _find_problem_of_ends(ended, work):
            return problem._replace(fault=described)
        failed = [end for end in ended if end.code]
        if len(failed) > (0 if case.second == PRUNE else 1):
            return Outcome("lost", described, "; ".join(f"failed: {end.last_lines}" for end in failed))
        return Outcome("survived", described)


def _run_both(commands: list[str], work: Path, delay: float) -> list[forked_lora.Ended]:
    running, text = [], "hello\n/quit\n"
    for number, command in enumerate(commands):
        if number:
            time.sleep(delay)
        running.append(
            forked_lora.start(command.split(), work, environment=workplace.environment(work), standard_input=text)
        )
    return [forked_lora.wait(process) for process in running]


def _find_problem_of_ends(ended: list[forked_lora.Ended], work: Path) -> Outcome | None:
    for end in ended:
        if end.traceback:
            return Outcome("traceback", "", end.traceback)
        if end.code and not end.is_told:
            return Outcome("lost", "", f"exit code {end.code}: {end.last_lines}")
    if left := workplace.leftovers(work):
        return Outcome("lost", "", f"leftovers: {', '.join(left)}")
    return None
