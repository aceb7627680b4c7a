"""Links in the place of files and folders of a run, of results and of the cache: nothing is written through them.

Each case replaces one path by a link, and runs one command. Afterwards the files outside are as they were; the command
ended with its usual result or with one error.
"""

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tests.faults import forked_lora, workplace
from tests.faults.campaign import Outcome
from tests.faults.workplace import Contents, contents, difference

# Commands on the finished run runs/new, and what they write.
COMMANDS = {
    "train recipe.yaml --resume": "runs/new",
    "train recipe.yaml --fresh": "runs/new",
    "merge runs/new --out out --force": "out",
    "export runs/new --to peft --out out --force": "out",
    "export runs/new --to gguf --out out.gguf --force --verify file": "out.gguf",
    "adapter resize runs/new --rank 2 --out out --force": "out",
    "adapter inspect runs/new --json out.json": "out.json",
    "eval runs/new --json out.json --answers 1 --predictions out.jsonl": "out.json",
    "chat runs/new --max-new-tokens 4": "out.json",
    "adapter convert pickled-a --out out --force": "out",
    "convert train.sh --out out.yaml": "out.yaml",
}
STEP = "runs/new/checkpoints/step-00000004"
PLACES = (
    *(f"runs/new/{name}" for name in (
        ".lora-lock", "recipe.yaml", "manifest.json", "metrics.jsonl", "answers.jsonl", "failed.json", "checkpoints",
        "adapter",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/trained_on.json",
        "adapter/tokenizer.json", "adapter/checksums.json", ".tmp-adapter-01234567", ".tmp-recipe.yaml-01234567",
        "earlier-1", "checkpoints/.tmp-step-00000004-01234567", "checkpoints/step-00000009", "checkpoints/step-best",
    )),
    *(f"{STEP}/{name}" for name in ("state.json", "adapter_model.safetensors", "optimizer.safetensors")), STEP,
    "out", "out.gguf", "out.export.json", "out.json", "out.jsonl", ".tmp-out-01234567", ".tmp-out.gguf-01234567",
    "cache", "cache/encoded", "recipe.yaml", "rows.jsonl", "base",
    "pickled-a", "pickled-a/adapter_model.bin", "pickled-a/adapter_config.json",
    "train.sh", "other.yaml", "dataset_info.json", "out.yaml", ".tmp-out.yaml-01234567",
)  # fmt: skip
# Targets of links, from the working folder: files and folders outside the run, nothing, the link itself, a device; or
# `moved`, the original in another folder, as a user makes it whose disk is full.
TARGETS = ("documents/letter.txt", "documents", "documents/empty", "nowhere", "itself", "/dev/full", "moved")


class Case(NamedTuple):
    """A link and a command."""

    place: str
    target: str
    command: str


def prepare(folder: Path, commands: Iterable[str] = COMMANDS) -> None:
    """Write documents and the run runs/new into the template, and run each of the commands without a link."""
    workplace.prepare(folder)
    template, results = folder / "template", {}
    with workplace.fresh(folder) as work:
        workplace.lora("train recipe.yaml", work)
        shutil.copytree(work / "runs/new", template / "runs/new")
    (template / "documents/empty").mkdir(parents=True)
    for name in ("letter.txt", "lock", "commit.json", "state.json"):
        (template / "documents" / name).write_text('{"names": ["letter.txt"], "replace": true}\n')
    for command in commands:
        with workplace.fresh(folder) as work:
            ended = _run(command, work)
            if ended.code:
                raise RuntimeError(f"lora {command}: {ended.err[-1000:]}")
            results[command] = contents(work / COMMANDS[command], without=("earlier-1",))
    (folder / "results.json").write_text(json.dumps(results))


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield each place with each target and each command, in random order."""
    commands = json.loads((folder / "results.json").read_text())
    # The cache may be another folder, if the user links it.
    everything = [
        Case(*case) for case in product(PLACES, TARGETS, commands)
        if not (case[0].startswith("cache") and case[1].startswith("documents"))
    ]  # fmt: skip
    random.Random(seed).shuffle(everything)
    yield from everything


def try_case(case: Case, folder: Path) -> Outcome:
    """Put the link of `case` into a working folder and run the command."""
    described = f"lora {case.command}, with {case.place} linked to {case.target}"
    with workplace.fresh(folder) as work:
        if not _put_link(work, case):
            return Outcome("not tried", described)
        outside = contents(work / "documents"), contents(work / "elsewhere")
        try:
            ended = _run(case.command, work)
        except TimeoutError as error:
            return Outcome("hang", described, str(error))
        if ended.traceback:
            return Outcome("traceback", described, ended.traceback)
        after = contents(work / "documents"), contents(work / "elsewhere")
        for now, before in zip(after, outside, strict=True):
            if changed := difference(now, before):
                return Outcome("lost", described, f"outside the run: {changed}")
        if problem := _find_problem(case, ended, work, json.loads((folder / "results.json").read_text())):
            return Outcome("silent" if ended.code == 0 else "lost", described, problem)
        return Outcome("survived", described)


def _put_link(work: Path, case: Case) -> bool:
    place, target = work / case.place, work / case.target
    if case.target == "moved":
        if place.is_symlink() or not place.exists():
            return False
        target = work / "elsewhere" / place.name
        target.parent.mkdir()
        place.rename(target)
    elif case.target == "itself":
        target = place
    if not place.parent.is_dir():
        return False
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(target)
    return True


def _run(command: str, work: Path) -> forked_lora.Ended:
    return forked_lora.run(
        command.split(), work, environment=workplace.environment(work), standard_input="hello\n/save out.json\n"
    )


def _find_problem(case: Case, ended: forked_lora.Ended, work: Path, results: dict[str, Contents]) -> str:
    left = [path for path in workplace.leftovers(work) if not (work / path).is_symlink()]
    if left:
        return f"leftovers: {', '.join(left)}"
    if ended.code:
        return "" if ended.is_told else f"exit code {ended.code}: {ended.last_lines}"
    result = COMMANDS[case.command]
    linked = f"{case.place}/".removeprefix(f"{result}/")  # in the result, if it is there at all
    found, expected = (
        {path: digest for path, digest in side.items() if not f"{path}/".startswith(linked)}
        for side in (contents(work / result, without=("earlier-1",)), results[case.command])
    )
    return difference({path: digest for path, digest in found.items() if path in expected}, expected)
