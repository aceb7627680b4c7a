"""Read all that a run folder has recorded, damaged or partial; what is missing becomes a note. No torch."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

from lora_cli.errors import LoraError, first_line
from lora_cli.run.folder import FAILURE, RUN_FILES, is_run
from lora_cli.run.metrics_log import read_metrics
from lora_cli.run.read_file import open_regular, read_json_object, read_text
from lora_cli.run.run_checksums import find_changed_records
from lora_cli.run.run_lock import user_of_run
from lora_cli.run.run_results import is_measurement
from lora_cli.run.shell import shell_path

Json = dict[str, Any]
Value = TypeVar("Value")
StateName = Literal["running", "finished", "failed", "stopped", "not started"]
MAX_RECIPE_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20


class RunState(NamedTuple):
    """Where a run stands."""

    name: StateName
    step: int  # the last one that the log has; 0 before the first
    total: int | None  # steps of the run; None if the manifest does not say
    saved: int | None  # step of the newest checkpoint
    process: str | None = None  # that trains it
    error: str | None = None  # that ended it
    hint: str | None = None

    def describe(self) -> str:
        """Return the state in a few words: `stopped at step 40 of 200`."""
        of = f" of {self.total:,}" if self.total is not None else ""
        match self.name:
            case "finished":
                return f"finished after {self.step:,} step{'s' * (self.step != 1)}"
            case "running":
                return f"running, step {self.step:,}{of}"
            case "not started":
                return "no step yet"
            case _:
                return f"{self.name} at step {self.step:,}{of}"


class Measurement(NamedTuple):
    """A JSON file of `lora eval`."""

    file: str
    content: Json
    of_adapter: bool | None  # whether it measured the run's adapter as it is now; None if the file does not tell

    def result(self, name: str) -> Json:
        """Return the figures of a model; empty if the file has none."""
        return as_object(as_object(self.content.get("results")).get(name))


class RecordedRun(NamedTuple):
    """All that the report shows of a run."""

    folder: Path
    name: str  # by which the report tells it from other runs
    state: RunState
    manifest: Json
    recipe_text: str
    recipe: Json
    steps: list[Json]  # records of metrics.jsonl with a loss
    evaluations: list[Json]  # with an eval_loss, in order
    answers: list[Json]  # of answers.jsonl
    measurements: list[Measurement]
    adapter: str | None  # SHA-256 of the weights, as recorded when they were written
    notes: list[str]  # what is missing or damaged, one line each

    @property
    def best(self) -> Json | None:
        """The evaluation with the lowest loss, the base's not included unless training went on from an adapter."""
        first = 0 if self.starts_from_adapter else 1
        candidates = [each for each in self.evaluations if each["step"] >= first]
        return min(candidates, key=lambda each: float(each["eval_loss"]), default=None)

    @property
    def loss_unit(self) -> str:
        """What the losses are."""
        is_regression = as_object(self.manifest.get("labels")).get("kind") == "regression"
        return "mean squared error" if is_regression else "nats per supervised unit"

    @property
    def starts_from_adapter(self) -> bool:
        """Whether training went on from another adapter: what was measured before step 1 is not the base."""
        return bool(as_object(self.recipe.get("adapter")).get("from") or self.manifest.get("origins"))

    @property
    def eval_command(self) -> str | None:
        """The command that measures the adapter where the report finds it; None before it is written."""
        if not os.path.lexists(self.folder / "adapter"):
            return None
        has_rows = as_object(self.manifest.get("ledger")).get("eval") is not None
        rows = "" if has_rows else " --data FILE"
        return f"lora eval {shell_path(self.folder)}{rows} --json {shell_path(self.folder / 'eval.json')}"

    @property
    def adapter_step(self) -> int | None:
        """The step of the written adapter; None if there is none."""
        step = as_object(self.manifest.get("result")).get("adapter_step")
        return step if isinstance(step, int) else None


def as_object(value: Any) -> Json:
    """Return a JSON object as it is, and an empty one for anything else: a damaged file can have any value."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a JSON list as it is, and an empty one for anything else."""
    return value if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    """Return a finite number of JSON as it is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    is_finite = abs(value) < 1 << 64 if isinstance(value, int) else math.isfinite(value)  # JSON has larger integers
    return value if is_finite else None


def check_is_run(folder: Path) -> None:
    """Raise if `folder` is not the folder of a run.

    Raises:
        LoraError: it does not exist, or contains no run.
    """
    # A file of a run, its adapter, or a checkpoint:
    run = next((parent for parent in [*folder.parents][:2] if is_run(parent)), None)
    if not os.path.isdir(folder):
        hint = "give the folder of a run; lora runs lists them" if run is None else f"give its run: {run}"
        raise LoraError(f"{folder} is not a folder", hint=hint)
    has_log = os.path.lexists(folder / "metrics.jsonl") or os.path.lexists(folder / "manifest.json")
    if not (is_run(folder) or has_log):
        hint = f"lora runs {shell_path(folder)} lists the runs in it" if run is None else f"give its run: {run}"
        raise LoraError(f"{folder} is not the folder of a run", hint=hint)


def read_state(folder: Path, manifest: Json, *, last: int, checkpoints: Sequence[int]) -> RunState:
    """Return where the run in `folder` stands.

    Args:
        folder: of the run.
        manifest: its manifest; empty if it is missing.
        last: the last step that its log has.
        checkpoints: steps of its checkpoints.
    """
    total, saved = as_number(manifest.get("steps")), max(checkpoints, default=None)
    steps = None if total is None else int(total)
    if (process := user_of_run(folder)) is not None:
        return RunState("running", last, steps, saved, process=process)
    if os.path.lexists(folder / FAILURE):
        try:
            failure = read_json_object(folder / FAILURE, limit=MAX_JSON_BYTES)
        except LoraError as reason:
            failure = {"error": reason.message}
        hint = failure.get("hint")
        return RunState("failed", last, steps, saved, error=str(failure.get("error")), hint=str(hint) if hint else None)
    result = as_object(manifest.get("result"))
    if result or (not manifest and os.path.lexists(folder / "adapter")):  # which a run writes at its end
        done = as_number(result.get("steps_done"))
        return RunState("finished", last if done is None else int(done), steps, saved)
    if not last and not checkpoints:
        return RunState("not started", 0, steps, None)
    return RunState("stopped", max(last, saved or 0), steps, saved)


def read_run(folder: Path, *, name: str, checkpoints: Sequence[int]) -> RecordedRun:
    """Read the run in `folder`; what is missing or damaged is in the notes.

    Args:
        folder: of a run, see `check_is_run`.
        name: by which the report tells it from others.
        checkpoints: steps of its checkpoints.
    """
    notes: list[str] = []
    nothing: Json = {}
    manifest = read_or_note(lambda: read_json_object(folder / "manifest.json", limit=MAX_JSON_BYTES), nothing, notes)
    recipe_text = read_or_note(lambda: read_text(folder / "recipe.yaml", limit=MAX_RECIPE_BYTES), "", notes)
    records = _log(folder / "metrics.jsonl", notes)
    steps = _in_order([record for record in records if "loss" in record], "steps", notes)
    measured = [record for record in records if as_number(record.get("eval_loss")) is not None]
    evaluations = _in_order(measured, "evaluations", notes)
    answers = _log(folder / "answers.jsonl", notes) if os.path.lexists(folder / "answers.jsonl") else []
    adapter = _adapter_digest(folder / "adapter", notes)
    state = read_state(folder, manifest, last=max((r["step"] for r in steps), default=0), checkpoints=checkpoints)
    notes += _state_notes(folder, state, steps, evaluations, manifest)
    if state.name == "finished":
        notes += [line.removeprefix("note: ") for line in find_changed_records(folder)]
    return RecordedRun(
        folder=folder,
        name=name,
        state=state,
        manifest=manifest,
        recipe_text=recipe_text,
        recipe=_parse_recipe(recipe_text, notes),
        steps=steps,
        evaluations=evaluations,
        answers=answers,
        measurements=_own_measurements(folder, adapter),
        adapter=adapter,
        notes=notes,
    )


def _state_notes(
    folder: Path, state: RunState, steps: list[Json], evaluations: list[Json], manifest: Json
) -> list[str]:
    """Return what the state of a run leaves out of its report, and what to do."""
    resume = f"lora train {shell_path(folder / 'recipe.yaml')} --resume"
    notes = []
    if state.name == "running":
        notes.append(f"process {state.process} trains this run: the page shows what there was when it was made")
    elif state.name == "failed":
        notes.append(f"the run failed: {state.error}" + (f" (hint: {state.hint})" if state.hint else ""))
    elif state.name == "stopped":
        where = "from its first step" if state.saved is None else f"from step {state.saved:,}"
        notes.append(f"the run has not ended: {resume} goes on {where}")
    if state.name == "finished" and not os.path.lexists(folder / "adapter"):
        notes.append("the run has ended, but its folder has no adapter")
    if not steps:
        notes.append("metrics.jsonl has no step: there are no curves")
    elif (missing := steps[-1]["step"] - sum(record["step"] > 0 for record in steps)) > 0:
        notes.append(f"metrics.jsonl lacks {missing:,} of {steps[-1]['step']:,} steps")
    if steps and not evaluations:
        why = "no row is held out" if as_object(manifest.get("ledger")).get("eval") is None else "none was made yet"
        notes.append(f"there is no evaluation: {why}")
    return notes


def _log(path: Path, notes: list[str]) -> list[Json]:
    """Return the records of a log, which may be missing; a damaged line is left out, and told."""
    try:
        with open_regular(path) as file:  # before the records: the log of a running run grows meanwhile
            lines = sum(line.endswith(b"\n") for line in file)
        records = read_metrics(path)
    except LoraError as reason:
        notes.append(reason.message if os.path.lexists(path) else f"{path.name} is missing")
        return []
    if lines > len(records):
        left_out = lines - len(records)
        notes.append(f"{path.name}: {left_out:,} of {lines:,} lines cannot be read, and are left out")
    return records


def _in_order(records: list[Json], what: str, notes: list[str]) -> list[Json]:
    """Return records by their step, of several of one step the last; a log that was edited can have any order."""
    by_step = {record["step"]: record for record in records}
    if repeated := len(records) - len(by_step):
        notes.append(f"metrics.jsonl has {repeated:,} {what} more than once: the last record is shown")
    return [by_step[step] for step in sorted(by_step)]


def read_or_note(read: Callable[[], Value], default: Value, notes: list[str]) -> Value:
    """Return what `read` returns; if it raises a LoraError, note why, and return `default`."""
    try:
        return read()
    except LoraError as reason:
        notes.append(reason.message)
        return default


def _parse_recipe(text: str, notes: list[str]) -> Json:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        notes.append(f"recipe.yaml cannot be read: {first_line(error)}")
        return {}
    if text and not isinstance(tree, dict):
        notes.append("recipe.yaml is no recipe")
    return as_object(tree)


def _adapter_digest(adapter: Path, notes: list[str]) -> str | None:
    """Return the SHA-256 of an adapter's weights by its checksums.json; None without one."""
    if not os.path.lexists(adapter):
        return None
    try:
        files = as_object(read_json_object(adapter / "checksums.json", limit=MAX_JSON_BYTES).get("files"))
    except LoraError as reason:
        notes.append(f"the adapter's identity is unknown: {reason.message}")
        return None
    digest = as_object(files.get("adapter_model.safetensors")).get("sha256")
    return digest if isinstance(digest, str) else None


def _own_measurements(folder: Path, adapter: str | None) -> list[Measurement]:
    """Return the results of `lora eval` in the run folder, by name."""
    paths = [p for p in sorted(folder.glob("*.json")) if p.name not in RUN_FILES]
    return [measured for path in paths if (measured := read_measurement(path, adapter)) is not None]


def read_measurement(path: Path, adapter: str | None) -> Measurement | None:
    """Return the result of `lora eval` in a JSON file; None if it is something else.

    Args:
        path: of the file.
        adapter: digest of the run's adapter; None if unknown.
    """
    try:
        content = read_json_object(path, limit=MAX_JSON_BYTES)
    except LoraError:
        return None
    if not is_measurement(content):
        return None
    digests = as_object(content.get("adapters"))
    return Measurement(path.name, content, None if adapter is None or not digests else adapter in digests.values())
