"""Faults of commands that write results: killed, failing, or out of space at one of their file operations.

Six campaigns over `scenarios.py: SCENARIOS`. After each fault, all results are complete; the same command again gives
what it gives without the fault, and leaves no temporary file. If files vanish, there is one error.
"""

import errno
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tests.faults import forked_lora, scenarios, workplace
from tests.faults.campaign import Outcome
from tests.faults.mounts import MountError, enlarge
from tests.faults.operations import CREATING, ERRORS, Action, fail_at, kill_after, kill_at, limit_file_size, remove_at
from tests.faults.scenarios import SCENARIOS, Record

# kill: SIGKILL before an operation; cut: the process is ended within a write after it; error: the operation fails;
# limit: no file may exceed a size; disk: the file system is full; vanish: another program removes a file or folder.
Fault = Literal["kill", "cut", "error", "limit", "disk", "vanish"]
SYNC = "fsync"
# What vanishes, as patterns: results, inputs, temporary files, and the working folder itself.
VANISHING = (
    "runs/new", "runs/new/checkpoints", "runs/new/checkpoints/step-*", "runs/new/.tmp-*", "runs/new/checkpoints/.tmp-*",
    "runs/new/metrics.jsonl", "runs/a", "runs/a/adapter", "runs/a/adapter/adapter_model.safetensors", "base",
    "base.gguf", "rows.jsonl", "cache", "cache/encoded/*", "cache/*/*/*.arrow", "out*", ".tmp-*", "*", ".",
)  # fmt: skip


class Case(NamedTuple):
    """One fault of one command."""

    scenario: str
    fault: Fault
    operation: int = 0  # number of the operation
    size: int = 0  # bytes: of a file, of the disk
    code: int = 0  # of errno
    lasting: bool = False
    path: str = ""  # of what vanishes


def cases(fault: Fault) -> Callable[[int, Path], Iterator[Case]]:
    """Return the function that yields the cases of a campaign: every operation once, in random order."""

    def draw(seed: int, folder: Path) -> Iterator[Case]:
        order, all_cases = random.Random(f"{fault} {seed}"), []
        for name, record in scenarios.read_records(folder).items():
            scenario = SCENARIOS[name]
            drawn = list(_cases_of(fault, name, record, random.Random(f"{fault} {seed} {name}")))
            all_cases += drawn if scenario.weight == 1 else order.sample(drawn, int(len(drawn) * scenario.weight) + 1)
        order.shuffle(all_cases)
        yield from all_cases

    return draw


def _cases_of(fault: Fault, name: str, record: Record, rng: random.Random) -> Iterator[Case]:
    operations = [(line[0] == "1", line[2:]) for line in record.operations]
    largest = max(record.largest, 4096)
    match fault:
        case "kill":
            for number, (changes, line) in enumerate(operations):
                if changes or line.startswith(SYNC):
                    yield Case(name, fault, number)
        case "cut":
            for number, (_, line) in enumerate(operations):
                if line.startswith(CREATING):
                    yield Case(name, fault, number, size=_draw_size(rng, largest))
        case "error":
            for number, (changes, line) in enumerate(operations):
                writes = changes or line.startswith(SYNC)
                code = rng.choice([code for code, writing in ERRORS.items() if writes or not writing])
                yield Case(name, fault, number, code=code, lasting=rng.random() < 0.3)
        case "vanish":
            for number in rng.sample(range(len(operations)), len(operations) // 4):
                yield Case(name, fault, number, path=rng.choice(VANISHING))
        case "limit" | "disk":
            for _ in range(20):
                yield Case(name, fault, size=_draw_size(rng, largest * (4 if fault == "disk" else 1)))


def _draw_size(rng: random.Random, largest: int) -> int:
    """Return a number of bytes from 0 to `largest`: small ones, whose file is the first, as often as large ones."""
    return int(largest ** rng.random()) if rng.random() < 0.5 else rng.randrange(largest)


def try_case(case: Case, folder: Path) -> Outcome:
    """Run the command of `case` with its fault, then the next command, in the prepared `folder`."""
    scenario, record = SCENARIOS[case.scenario], scenarios.read_records(folder)[case.scenario]
    described = _describe(case, record)
    try:
        with scenarios.working_folder(folder, case.scenario, free=case.size if case.fault == "disk" else None) as work:
            ended = scenarios.run_with(work, scenario, _action(case))
            outcome = _judge_end(case, ended, described)
            if case.fault == "vanish":  # what is left is no matter of the command
                return outcome or Outcome("survived", described)
            outcome = outcome or _judge_results(case, work, record, described)
            if case.fault == "disk":
                enlarge(work)
            return outcome or _try_again(case, work, record, described)
    except TimeoutError as error:
        return Outcome("hang", described, str(error))
    except MountError as error:
        return Outcome("not tried", described, str(error))


def _describe(case: Case, record: Record) -> str:
    operation = record.operations[case.operation][2:] if case.operation < len(record.operations) else ""
    place = f"operation {case.operation}, {operation}"
    match case.fault:
        case "kill":
            what = f"killed before {place}"
        case "cut":
            what = f"ended at byte {case.size:,} of a file after {place}"
        case "error":
            what = f"{errno.errorcode[case.code]}{' from then on' if case.lasting else ''} at {place}"
        case "vanish":
            what = f"{case.path} removed before {place}"
        case "limit":
            what = f"files limited to {case.size:,} bytes"
        case "disk":
            what = f"{case.size:,} bytes free"
    return f"lora {case.scenario}: {what}"


def _action(case: Case) -> Action:
    match case.fault:
        case "kill":
            return kill_at(case.operation)
        case "cut":
            return kill_after(case.operation, case.size)
        case "error":
            return fail_at(case.operation, case.code, lasting=case.lasting)
        case "vanish":
            return remove_at(case.operation, case.path)
        case "limit":
            return lambda operation: limit_file_size(case.size) if operation.number == 0 else None
        case "disk":
            return lambda operation: None


def _judge_end(case: Case, ended: forked_lora.Ended, described: str) -> Outcome | None:
    """Return the outcome if it can be told from the end of the command; None to go on."""
    if ended.traceback:
        return Outcome("traceback", described, ended.traceback)
    if case.fault in ("kill", "cut"):
        expected = -signal.SIGKILL if case.fault == "kill" else -signal.SIGXFSZ
        # A cut that no write reaches, and operations whose number varies a little.
        return Outcome("not tried", described) if ended.code != expected else None
    if ended.code and not ended.is_told:
        return Outcome("lost", described, f"exit code {ended.code}: {ended.err[-500:]}")
    return None


def _judge_results(case: Case, work: Path, record: Record, described: str) -> Outcome | None:
    if problem := scenarios.find_problem(work, case.scenario, record):
        return Outcome("lost", described, problem)
    # After other errors a command may be unable to remove its temporary files: the error may be one of removing.
    if case.fault in ("limit", "disk") and (left := workplace.leftovers(work)):
        return Outcome("lost", described, f"leftovers: {', '.join(left)}")
    return None


def _try_again(case: Case, work: Path, record: Record, described: str) -> Outcome:
    """Run the next command where nothing fails any more."""
    scenario = SCENARIOS[case.scenario]
    before = scenarios.is_new(work, case.scenario, record)
    ended = None
    for command in scenario.again or (scenario.command,):
        ended = forked_lora.run(
            command.split(), work, environment=workplace.environment(work), standard_input=scenario.standard_input
        )
        if ended.traceback:
            return Outcome("traceback", f"{described}; then lora {command}", ended.traceback)
        if ended.code == 0:
            break
    assert ended is not None
    # Without --force, an existing result is refused: rightly if it is the complete new one, which the command may have
    # completed before it looked.
    new = not before or not scenarios.is_new(work, case.scenario, record)
    if ended.code and not (new and any(words in ended.err for words in ("exists", "contains a run already"))):
        return Outcome("lost", described, f"the next command fails: {ended.last_lines}")
    if problem := scenarios.find_problem(work, case.scenario, record) or scenarios.is_new(work, case.scenario, record):
        return Outcome("lost", described, f"after the next command: {problem}")
    if left := workplace.leftovers(work):
        return Outcome("lost", described, f"leftovers after the next command: {', '.join(left)}")
    return Outcome("survived", described)
