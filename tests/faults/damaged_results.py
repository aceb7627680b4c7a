"""Damaged files of runs, caches, models and exports: a command that reads them gives its usual result, or an error.

Each case damages one file (see `damage.py`) and runs one command. A different result without a word is `silent`.
"""

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults import forked_lora, workplace
from tests.faults.campaign import Outcome
from tests.faults.damage import Damage, damages
from tests.faults.workplace import Contents, contents, difference

TOLD = (
    *("damaged", "checksum", "differs", "other contents", "not the one", "set aside", "is missing", "not compared"),
    "lacks the records",
)


class Target(NamedTuple):
    """What is damaged, and the commands that read it with their results."""

    path: str  # in the working folder
    commands: dict[str, str]
    other: str = ""  # an intact one of the same kind
    replaceable: bool = False  # whether an intact other one in its place is meant: nothing tells it from the first
    verified: bool = True  # whether it has checksums: other contents of another tool's model may be meant


_ADAPTER = {
    "merge {} --out out": "out",
    "export {} --to peft --out out": "out",
    "export {} --to gguf-adapter --out out.gguf --verify file": "out.gguf",
    "adapter resize {} --rank 2 --out out": "out",
    "adapter inspect {} --json out.json": "out.json",
    "eval {} --json out.json": "out.json",
}
_MODEL = {
    "export {} --to gguf --out out.gguf --verify file": "out.gguf",
    "eval runs/a --adapter merged={} --json out.json": "out.json",
    "chat {} --max-new-tokens 4": "out.json",
}
TARGETS = {
    "stopped run": Target("runs/stopped", {"train recipe.yaml --output runs/stopped --resume": "runs/stopped/adapter"}),
    "checkpoint": Target(
        "runs/stopped/checkpoints",
        {"train recipe.yaml --output runs/stopped --resume": "runs/stopped/adapter"},
        other="runs/a/checkpoints",
    ),
    "finished run": Target(
        "runs/a",
        {
            "train a.yaml --resume": "runs/a/adapter",
            "train a.yaml --fresh": "runs/a/adapter",
            **{command.format("runs/a"): result for command, result in _ADAPTER.items()},
            "chat runs/a --max-new-tokens 4": "out.json",
        },
        other="runs/b",
        replaceable=True,
    ),
    "adapter": Target(
        "runs/a/adapter",
        {command.format("runs/a"): result for command, result in _ADAPTER.items()},
        other="runs/b/adapter",
    ),
    "cache": Target("cache", {"train recipe.yaml": "runs/new/adapter", "check recipe.yaml": "cache"}),
    "merged model": Target("merged", {command.format("merged"): result for command, result in _MODEL.items()}),
    "base": Target(
        "tiny",
        {
            "train recipe.yaml --set model.path=tiny": "runs/new/adapter",
            "merge runs/a --base tiny --out out": "out",
            "check recipe.yaml --set model.path=tiny": "",
        },
        other="merged",
        verified=False,
    ),
    "GGUF base": Target("base.gguf", {"train gguf.yaml": "runs/new/adapter"}, verified=False),
    "pickled adapter": Target(
        "pickled-a", {"adapter convert pickled-a --out out": "out"}, other="pickled-b", verified=False
    ),
    "other tool's command": Target("train.sh", {"convert train.sh --out out.yaml": "out.yaml"}, verified=False),
    "other tool's config": Target("other.yaml", {"convert train.sh --out out.yaml": "out.yaml"}, verified=False),
    "other tool's datasets": Target(
        "dataset_info.json", {"convert train.sh --out out.yaml": "out.yaml"}, verified=False
    ),
}


class Case(NamedTuple):
    """A damage and a command."""

    target: str  # of TARGETS
    damage: int  # number among those of the target
    seed: int
    command: str


def prepare(folder: Path, names: Iterable[str] = TARGETS) -> None:
    """Write a stopped run, a merged model and a copy of the base into the template, and run each command undamaged.

    Args:
        folder: to prepare.
        names: of TARGETS: what will be damaged.
    """
    workplace.prepare(folder)
    template = folder / "template"
    with workplace.fresh(folder) as work:
        workplace.lora("train recipe.yaml --output runs/stopped --set training.keep_checkpoints=2", work)
        for name in ("adapter", "checkpoints/step-00000004"):
            shutil.rmtree(work / "runs/stopped" / name)
        (work / "runs/stopped/checksums.json").unlink()  # which a finished run has
        workplace.lora("merge runs/a --out merged", work)
        for name in ("runs/stopped", "merged"):
            shutil.copytree(work / name, template / name)
    shutil.copytree(folder / "base-model", template / "tiny")
    results: dict[str, dict[str, Contents]] = {}
    for name in names:
        results[name] = {}
        for command, result in TARGETS[name].commands.items():
            with workplace.fresh(folder) as work:
                ended = _run(command, work)
                if ended.code:
                    raise RuntimeError(f"lora {command}: {ended.err[-1000:]}")
                results[name][command] = contents(work / result) if result else {}
    (folder / "results.json").write_text(json.dumps(results))


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield each damage of each target with one of its commands, in random order."""
    rng, everything = random.Random(seed), []
    for name in json.loads((folder / "results.json").read_text()):
        target = TARGETS[name]
        for number, _ in enumerate(_damages(folder / "template", name, seed)):
            everything.append(Case(name, number, seed, rng.choice(list(target.commands))))
    rng.shuffle(everything)
    yield from everything


def _damages(template: Path, name: str, seed: int) -> list[Damage]:
    target = TARGETS[name]
    other = template / target.other if target.other else None
    found = damages(template / target.path, seed=seed, other=other, repeats=3)
    replaced = f"foreign {Path(target.path).name}/"
    return [damage for damage in found if not (target.replaceable and damage.name == replaced)]


def try_case(case: Case, folder: Path) -> Outcome:
    """Damage a file in a working folder and run the command of `case`."""
    target, damage = TARGETS[case.target], _damages(folder / "template", case.target, case.seed)[case.damage]
    described = f"lora {case.command}, {case.target}: {damage.name}"
    expected: Contents = json.loads((folder / "results.json").read_text())[case.target][case.command]
    with workplace.fresh(folder) as work:
        damage.apply(work / target.path)
        try:
            ended = _run(case.command, work)
        except TimeoutError as error:
            return Outcome("hang", described, str(error))
        if ended.traceback:
            return Outcome("traceback", described, ended.traceback)
        if left := workplace.leftovers(work):
            return Outcome("lost", described, f"leftovers: {', '.join(left)}")
        result = target.commands[case.command]
        if ended.code:
            return _judge_refusal(case, work, ended, described, result)
        changed = difference(contents(work / result), expected) if result not in ("", "cache") else ""
        if changed and target.verified and not any(word in ended.err for word in TOLD):
            return Outcome("silent", described, f"{result}: {changed}; stderr: {ended.err[-300:]}")
        return Outcome("survived", described)


def _judge_refusal(case: Case, work: Path, ended: forked_lora.Ended, described: str, result: str) -> Outcome:
    if not ended.is_told:
        return Outcome("lost", described, f"exit code {ended.code}: {ended.last_lines}")
    if result.startswith("out") and (work / result).exists():
        return Outcome("lost", described, f"{result} is there after an error: {ended.last_lines}")
    return Outcome("survived", described)


def _run(command: str, work: Path) -> forked_lora.Ended:
    return forked_lora.run(
        command.split(), work, environment=workplace.environment(work), standard_input="hello\n/save out.json\n"
    )
