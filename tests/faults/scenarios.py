"""Commands that write results, and the law of each result: old or new, complete, whatever happens to the command."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.faults import forked_lora, workplace
from tests.faults.operations import call_before_operations, record_in
from tests.faults.workplace import Contents, contents, difference
from tests.support.workspaces import leave_workspace

# whole: a file or folder, the old or the new one; description: a file that belongs to the first result; run: a run
# folder, with complete checkpoints and an adapter that is complete or missing; entries: a cache, whose entries are
# complete or missing; pruned: a cache whose good entries stay, and whose other ones are as they were, or gone.
Law = Literal["whole", "description", "run", "entries", "pruned"]


class Scenario(NamedTuple):
    """A command, its results, and the next command after a fault."""

    command: str
    results: dict[str, Law]  # by path in the working folder
    before: str = ""  # a command whose results are there before
    change: Callable[[Path], None] | None = None  # what happens to these results
    again: tuple[str, ...] = ()  # the next commands, until one succeeds; empty: the same command
    standard_input: str = ""
    weight: float = 1.0  # share of its operations that a campaign takes: less for a slow command


def _both(command: str, other: str, results: dict[str, Law], **options: Any) -> Iterator[Scenario]:
    yield Scenario(command, results, **options)
    yield Scenario(f"{command} --force", results, before=other, **options)


def _scenarios() -> Iterator[Scenario]:
    resume = {name: (f"train {name}.yaml --resume", f"train {name}.yaml") for name in workplace.RECIPES}
    for name in ("recipe", "best"):
        yield Scenario(f"train {name}.yaml", {"runs/new": "run"}, again=resume[name])
    yield Scenario("train gguf.yaml", {"runs/new": "run", "cache": "entries"}, again=resume["gguf"])
    other = "train recipe.yaml --set training.seed=7"
    fresh = "train recipe.yaml --fresh"
    yield Scenario(fresh, {"runs/new": "run"}, before=other)
    yield Scenario(fresh, {"runs/new": "run"}, before=other, again=("train recipe.yaml --resume", fresh))
    yield Scenario("check recipe.yaml --set data.max_length=100", {"cache": "entries"})
    shards = "--max-shard-size 200KB"
    yield from _both(f"merge runs/a --out out {shards}", f"merge runs/b --out out {shards}", {"out": "whole"})
    for to, out in (
        ("safetensors", "out"), ("peft", "out"), ("vllm", "out"), ("gguf-adapter", "out.gguf"), ("gguf", "out.gguf"),
        ("ollama", "out"), ("onnx", "out"),
    ):  # fmt: skip
        results: dict[str, Law] = {"out": "whole"}
        if out == "out.gguf":
            results = {"out.gguf": "whole", "out.export.json": "description"}
        command, other = (f"export runs/{run} --to {to} --out {out} --verify file" for run in "ab")
        yield from _both(command, other, results, weight=0.1 if to == "onnx" else 1.0)
    yield from _both(
        "adapter resize runs/a --rank 2 --out out", "adapter resize runs/b --rank 2 --out out", {"out": "whole"}
    )
    yield from _both(
        "adapter combine runs/a 0.5*runs/b --out out", "adapter combine runs/b 0.1*runs/a --out out", {"out": "whole"}
    )
    yield from _both("adapter convert pickled-a --out out", "adapter convert pickled-b --out out", {"out": "whole"})
    figures: dict[str, Law] = {"out.json": "whole"}
    yield Scenario("eval runs/a --json out.json", figures, before="eval runs/b --json out.json")
    yield Scenario("eval runs/a --answers 1 --predictions out.jsonl", {"out.jsonl": "whole"})
    yield Scenario("adapter inspect runs/a --json out.json", figures, before="adapter inspect runs/b --json out.json")
    page: dict[str, Law] = {"out.html": "whole", "cache": "entries"}
    yield Scenario("report runs/a --out out.html", page, before="report runs/b --out out.html", weight=0.1)
    yield Scenario("chat runs/a --max-new-tokens 4", figures, standard_input="hello\n/save out.json\n")
    yield Scenario("convert train.sh --out out.yaml", {"out.yaml": "whole"})
    yield Scenario("init quickstart", {"quickstart.yaml": "whole"})
    other = "check recipe.yaml --set data.max_length=100"
    yield Scenario("cache --prune", {"cache": "pruned"}, before=other, change=_spoil_cache)


def _spoil_cache(work: Path) -> None:
    """Let one of two entries be old, and add a damaged one, and what a killed encoding and a killed writer leave."""
    encoded = work / "cache" / "encoded"
    good, old = sorted(encoded.glob("[!.]*/checksums.json"), key=lambda file: file.stat().st_mtime)
    os.utime(old, (0, 0))
    shutil.copytree(good.parent, encoded / "damaged")
    shutil.copytree(good.parent, encoded / ".unfinished-rows")
    shutil.copytree(good.parent, leave_workspace(encoded / "killed") / "killed")


# By name: the command, with a mark where the next command differs.
SCENARIOS = {
    f"{scenario.command}{' then --resume' if scenario.before and scenario.again else ''}": scenario
    for scenario in _scenarios()
}


class Record(NamedTuple):
    """What a command does without a fault."""

    operations: list[str]  # each with `1 ` before it if it may change the folder, else `0 `
    largest: int  # bytes of the largest file that it writes
    inputs: Contents  # of the working folder without the results
    old: dict[str, Contents]  # before the command, by result
    new: dict[str, Contents]  # after it
    checkpoints: Contents  # all that it writes, also those that it prunes
    seconds: float  # that it takes


def prepare(folder: Path, names: Iterable[str] = SCENARIOS) -> None:
    """Prepare working folders, and record each of the commands without a fault in records.json."""
    workplace.prepare(folder)
    records = {name: _record(folder, name) for name in names}
    (folder / "records.json").write_text(json.dumps(records))


def read_records(folder: Path) -> dict[str, Record]:
    """Return the records of a prepared folder by the name of their scenario."""
    return {name: Record(*values) for name, values in json.loads((folder / "records.json").read_text()).items()}


def _record(folder: Path, name: str) -> Record:
    scenario, before, operations = SCENARIOS[name], _results_before(folder, name), folder / "operations"
    with workplace.fresh(folder) as work:
        if scenario.before:
            workplace.lora(scenario.before, work)
            if scenario.change is not None:
                scenario.change(work)
            for result in scenario.results:
                (before / result).parent.mkdir(parents=True, exist_ok=True)
                _copy(work / result, before / result)
    checkpoints: Contents = {}
    if "run" in scenario.results.values():
        with working_folder(folder, name) as work:
            workplace.lora(f"{scenario.command} --set training.keep_checkpoints=99", work)
            checkpoints = contents(work / "runs/new/checkpoints")
    with working_folder(folder, name) as work:
        inputs, old = _without(work, scenario), _results(work, scenario)
        ended = run_with(work, scenario, record_in(operations))
        if ended.code:
            raise RuntimeError(f"lora {scenario.command}: {ended.err[-1000:]}")
        new = _results(work, scenario)
        largest = max(path.stat().st_size for result in scenario.results for path in _files(work / result))
        if (changed := difference(_without(work, scenario), inputs)) or not any(new.values()):
            raise RuntimeError(f"lora {scenario.command}: inputs changed: {changed}")
    lines = operations.read_text(encoding="utf-8").splitlines()
    return Record(lines, largest, inputs, old, new, checkpoints, ended.seconds)


def run_with(work: Path, scenario: Scenario, action: Any) -> forked_lora.Ended:
    """Run the command of a scenario, and call `action` before its file operations."""
    return forked_lora.run(
        scenario.command.split(),
        work,
        environment=workplace.environment(work),
        before=lambda: call_before_operations(work, action),
        standard_input=scenario.standard_input,
    )


@contextmanager
def working_folder(folder: Path, name: str, *, free: int | None = None) -> Iterator[Path]:
    """Yield a working folder in which the command of the scenario `name` can run, with the results before it.

    Args:
        folder: prepared.
        name: of the scenario.
        free: bytes that are free on its disk, see `workplace.fresh`.

    Raises:
        OSError: a small disk cannot be mounted.
    """
    with workplace.fresh(folder, _results_before(folder, name), free=free) as work:
        yield work


def _results_before(folder: Path, name: str) -> Path:
    return folder / "before" / str(list(SCENARIOS).index(name))


def find_problem(work: Path, name: str, record: Record) -> str:
    """Return what is not as it must be in a working folder, whatever happened to the command; empty: all is well."""
    scenario = SCENARIOS[name]
    found = _results(work, scenario)
    if changed := difference(_without(work, scenario), record.inputs):
        return f"inputs: {changed}"
    first = next(iter(scenario.results))
    for result, law in scenario.results.items():
        here, old, new = found[result], record.old[result], record.new[result]
        match law:
            case "whole" if here not in (old, new):
                return f"{result} is neither the old nor the new one: {difference(here, new)}"
            case "description" if here not in (old, new, {}):
                return f"{result} is half"
            case "description" if here and (here == old) is not (found[first] == record.old[first]):
                return f"{result} is not that of {first}"
            case "entries" | "pruned" if half := _find_half_entry(here, old, new):
                return f"{result}/{half} is half"
            case "pruned" if gone := _find_missing_entry(here, new):
                return f"{result}/{gone} is gone"
            case "run" if problem := find_problem_of_run(here, old, new, record.checkpoints):
                return f"{result}: {problem}"
    return ""


def find_problem_of_run(here: Contents, old: Contents, new: Contents, checkpoints: Contents) -> str:
    """Return what is not as it must be in the folder of a run that may be incomplete; empty: all is well.

    Args:
        here: of the folder.
        old: of the earlier run in it, before `--fresh`.
        new: of the run after an uninterrupted training.
        checkpoints: all that the training writes.
    """
    adapter = _below(here, "adapter")
    if adapter not in ({}, _below(new, "adapter"), _below(old, "adapter")):
        return f"the adapter is half: {difference(adapter, _below(new, 'adapter'))}"
    places = [here, *(_below(here, f"earlier-{number}") for number in range(1, 4))]
    old_checkpoints = _below(old, "checkpoints")
    for step, files in _group(_below(here, "checkpoints")).items():
        if not _below(checkpoints, step) and "checksums.json" in files:
            continue  # of a step at which workers have stopped; the next command verifies it
        if files not in (_below(checkpoints, step), _below(old_checkpoints, step)) and not _is_temporary(step):
            return f"checkpoint {step} is half: {difference(files, _below(checkpoints, step))}"
    for name, files in _group(old).items():  # of the earlier run: here, or moved aside as a whole
        if not any(_group(place).get(name) == files for place in places):
            return f"{name} of the earlier run is gone"
    return ""


def is_new(work: Path, name: str, record: Record) -> str:
    """Return how the results differ from those of a command without a fault; empty: they are the same."""
    for result, law in SCENARIOS[name].results.items():
        here, expected = contents(work / result), record.new[result]
        if law == "run":  # a killed run may also have been moved aside
            here = {path: digest for path, digest in here.items() if not path.startswith("earlier-")}
            expected = {path: digest for path, digest in expected.items() if not path.startswith("earlier-")}
            moved = [_below(contents(work / result), f"earlier-{number}") for number in range(1, 4)]
            if record.old[result] and record.old[result] not in moved:
                return f"{result}: the earlier run is not in one folder: {difference(moved[0], record.old[result])}"
        if law == "entries":
            if missing := _find_missing_entry(here, expected):
                return f"{result}: {missing} is missing"
            continue
        if law == "pruned":
            here, expected = (
                {path: digest for path, digest in found.items() if "/.lock-" not in path} for found in (here, expected)
            )
        if changed := difference(here, expected):
            return f"{result}: {changed}"
    return ""


def _find_half_entry(here: Contents, old: Contents, new: Contents) -> str:
    complete = [*_entries(old).values(), *_entries(new).values()]
    return next((name for name, files in _entries(here).items() if files not in complete), "")


def _find_missing_entry(here: Contents, new: Contents) -> str:
    entries = _entries(here).values()
    return next((name for name, files in _entries(new).items() if files not in entries), "")


def _entries(cache: Contents) -> dict[str, Contents]:
    """Return the files of each entry of a cache by kind and key; keys depend on the path of the working folder."""
    entries: dict[str, Contents] = {}
    for path, digest in cache.items():
        if digest != workplace.EMPTY and not _is_temporary(path):
            kind, key, *rest = path.split("/")
            entries.setdefault(f"{kind}/{key}", {})["/".join(rest)] = digest
    return entries


def _results(work: Path, scenario: Scenario) -> dict[str, Contents]:
    return {result: contents(work / result) for result in scenario.results}


def _without(work: Path, scenario: Scenario) -> Contents:
    """Return the contents of a working folder without results, caches and temporary files."""
    found = contents(work, without=("cache",))
    return {
        path: digest
        for path, digest in found.items()
        if not _is_temporary(path) and not any(f"{path}/".startswith(f"{result}/") for result in scenario.results)
    }


def _is_temporary(path: str) -> bool:
    return any(part.startswith((".tmp-", ".lock-", ".unfinished-")) for part in Path(path).parts)


def _below(found: Contents, folder: str) -> Contents:
    return {path.removeprefix(f"{folder}/"): text for path, text in found.items() if path.startswith(f"{folder}/")}


def _group(found: Contents) -> dict[str, Contents]:
    """Return contents by the first part of their path."""
    groups: dict[str, Contents] = {}
    for path, digest in found.items():
        first, _, rest = path.partition("/")
        groups.setdefault(first, {})[rest] = digest
    return groups


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.exists():
        shutil.copy(source, target)
