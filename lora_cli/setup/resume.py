"""Resume a run with a changed recipe, other data or on another machine: refused with a diff, or applied and told.

What each key means is in `recipe/resume_keys.py`. The values of the run are those of the checkpoint's state.json: the
recipe.yaml beside it may have been edited.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_cli.errors import LoraError
from lora_cli.recipe.problem import shorten
from lora_cli.recipe.resume_keys import FILLED_IN, Change, Effect, find_changes, show_value
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training.checkpoint_folders import STATE_FILE, Info, SavedState, newest_checkpoint, set_aside_damaged
from lora_cli.training.lr_schedule import learning_rate

State = Mapping[str, Any]  # of state.json, see `run_records.resume_state`
LENGTH = {"training.epochs", "training.max_steps", "training.warmup", "steps of the run"}  # names in a diff
# What is told of a change that applies, by its effect.
APPLIES: dict[Effect, str] = {
    "rates": "applies from here (the learning rates so far are the same)",
    "data": "(the rows are the same)",
    "model": "(the weights are the same)",
    "dtype": "(the dtype of the run is the same)",
    "optimizer": "(the optimizer of the run is the same)",
    "batches_per_step": "(as many batches per step)",
    "origins": "(the adapter is the same)",
    "rounding": "applies from here (results differ within rounding)",
    "none": "applies from here",
    "place": "(the run folder was moved)",
}


class _Recorded(BaseModel):
    model_config = ConfigDict(strict=True)


class _RecordedSource(_Recorded):
    source: str
    split: str
    content: str
    read: int
    kept: int


class _RecordedOrigin(_Recorded):
    digest: str


class _RecordedSpikes(_Recorded):
    count: int
    skipped: int
    skipped_in_a_row: int
    losses: list[float]


class _RecordedRung(_Recorded):
    every: int | None
    offload: bool
    parts: int


class _RecordedScale(_Recorded):
    value: float
    overflows: int
    steps: int


class _RecordedValues(_Recorded):
    """What state.json must have; other keys are passed over."""

    recipe: Recipe
    step: int
    total_steps: int
    batches_per_step: int
    batch_size: int
    data: str
    sources: list[_RecordedSource]
    template: str
    labels: list[str] | None
    model: str
    model_is_local: bool
    dtype: str
    attention: str
    optimizer: str
    origins: list[_RecordedOrigin]
    versions: dict[str, str]
    machine: dict[str, str | int]
    evaluations: list[list[float]]
    loss_spikes: _RecordedSpikes
    memory: _RecordedRung
    loss_scale: _RecordedScale
    changes: list[dict[str, Any]] = []


def find_run_state(recipe: Recipe, *, info: Info | None) -> SavedState | None:
    """Return the newest checkpoint of the run that `recipe` resumes; None if it has none yet.

    Args:
        recipe: of the run.
        info: reports damaged checkpoints, which are set aside; None if another process of the run has done this.

    Raises:
        LoraError: the recipe changes what is learned, as far as that is known without rows and model; or the base was a
            local path, which does not exist.
    """
    folder = Path(recipe.output) / "checkpoints"
    if info is not None:
        set_aside_damaged(folder, info=info)
    saved = newest_checkpoint(folder)
    if saved is None:
        return None
    _check_values(saved)
    changes = find_changes(_recipe_of(saved), recipe)
    changes = [c for c in changes if not (c.key in FILLED_IN and c.after == FILLED_IN[c.key])]
    refused = [c.line() for c in changes if c.effect == "learned"]
    # Epochs are steps only when the rows are known.
    total = recipe.training.max_steps
    if total is None and not any(c.key in ("training.epochs", "training.max_steps") for c in changes):
        total = int(saved.values["total_steps"])
    if total is not None:
        refused += _refused_rates(saved, changes, recipe.training, total=total)
    if refused:
        raise _refusal(saved, refused)
    # A relative path without a folder looks like a hub id, which would be searched for on the hub.
    if saved.values["model_is_local"] and not os.path.lexists(recipe.model.path):  # of any length
        raise LoraError(
            f"model.path: {recipe.model.path} does not exist in this working folder, {Path.cwd()}",
            hint="run the command where the run was started, or give its new path: --set model.path=PATH",
        )
    return saved


def check_inputs(saved: SavedState, recipe: Recipe, state: State) -> list[Change]:
    """Return the changes that apply to the resumed run, and leave all it has learned as it is.

    Args:
        saved: the checkpoint.
        recipe: of the run, resolved.
        state: of the run now.

    Raises:
        LoraError: recipe, rows or base change what is learned.
    """
    changes = find_changes(_recipe_of(saved), recipe)
    differing = {name for name in FACTS if saved.values[name] != state[name]}
    guilty = [change for change in changes if change.effect == "learned" or change.effect in differing]
    refused = [change.line() for change in guilty]
    total = int(state["total_steps"])
    if not differing & {"data", "batches_per_step"}:  # which change the number of steps
        refused += _refused_rates(saved, changes, recipe.training, total=total)
    for name in (name for name in FACTS if name in differing):
        values = saved.values[name], state[name]
        if not any((change.before, change.after) == values for change in guilty):
            refused += FACTS[name](saved.values, state)
    if not refused and "data" in differing:
        refused.append("data: the same files give other tokens or another order: see the versions in manifest.json")
    if any(line.startswith("training.tokens_per_batch") for line in refused):  # its default
        refused += [change.line() for change in changes if change.key == "data.max_length"]
    before = int(saved.values["total_steps"])
    if recipe.adapter.method == "adalora" and total != before:
        refused.append(f"steps: {before:,} -> {total:,}, and adalora drops ranks by their number")
    if refused:
        raise _refusal(saved, list(dict.fromkeys(refused)))
    return changes


def check_model(saved: SavedState, state: State) -> None:
    """Check the adapter that training went on from; `state` is that of the run now.

    Raises:
        LoraError: it is another adapter than that of the checkpoint.
    """
    before, now = ([origin["digest"] for origin in values["origins"]] for values in (saved.values, state))
    if before != now:
        raise _refusal(saved, ["adapter.from: other weights than when the run started"])


def describe_changes(saved: SavedState, changes: Sequence[Change], state: State) -> list[str]:
    """Return a line for each change that applies, and one for what else differs from the checkpoint's run."""
    lines = [f"--resume: {change.line()} {APPLIES[change.effect]}" for change in changes]
    before = {**saved.values["versions"], **saved.values["machine"]}
    now = {**state["versions"], **state["machine"]}
    if not any(change.key == "model.attention" for change in changes):
        before["attention"], now["attention"] = saved.values["attention"], state["attention"]
    others = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    if others:
        lines.append(f"--resume: {', '.join(others)}: the result equals an uninterrupted run's within rounding only")
    elif state["machine"]["device"] != "cpu" and not state["recipe"]["performance"]["deterministic"]:
        lines.append(
            "--resume: on a GPU the result equals an uninterrupted run's within rounding; exactly, if both have "
            "performance.deterministic: true"
        )
    return lines


def record_changes(saved: SavedState, changes: Sequence[Change]) -> list[dict[str, Any]]:
    """Return all changes that were applied to the run, as JSON, with the number of steps done before each."""
    earlier: list[dict[str, Any]] = saved.values.get("changes", [])
    return [*earlier, *({"step": saved.step, "key": c.key, "before": c.before, "after": c.after} for c in changes)]


def _refused_rates(saved: SavedState, changes: Sequence[Change], spec: TrainingSpec, *, total: int) -> list[str]:
    """Return lines on changes of the schedule that would have given the steps done other learning rates."""
    before, done = int(saved.values["total_steps"]), saved.step
    of_schedule = [change.line() for change in changes if change.effect == "rates"]
    if not of_schedule and total == before:
        return []
    if total < done:
        return [*of_schedule, f"steps of the run: {before:,} -> {total:,}, but {done:,} are done"]
    earlier = _recipe_of(saved).training
    if all(
        learning_rate(step, spec=earlier, total=before) == learning_rate(step, spec=spec, total=total)
        for step in range(done)
    ):
        return []
    return of_schedule or [f"steps of the run: {before:,} -> {total:,}"]


def _recipe_of(saved: SavedState) -> Recipe:
    """Return the recipe of a checkpoint; keys that its version did not have, have their defaults."""
    return Recipe.model_validate(saved.values["recipe"])


def _check_values(saved: SavedState) -> None:
    try:
        _RecordedValues.model_validate(saved.values)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise LoraError(
            f"{saved.folder} was written by another version of lora: unexpected `{shorten(key)}` in its {STATE_FILE}",
            hint="resume with the version that the run was started with, or start over with --fresh",
        ) from None


def _refusal(saved: SavedState, lines: Sequence[str]) -> LoraError:
    names = list(dict.fromkeys(line.partition(": ")[0] for line in lines))
    go_on = f"a new run, with another output, can go on from this adapter with adapter.from: {saved.folder}"
    if set(names) <= LENGTH:
        go_on = "only with schedule constant or wsd, and warmup and decay in steps, a run can be made longer or shorter"
    return LoraError(
        f"{saved.folder}: cannot resume, changed since this checkpoint: {', '.join(names)}",
        hint=f"undo these changes, or start over with --fresh; {go_on}",
        details=lines,
    )


def _explain_data(before: State, now: State) -> list[str]:
    """Return lines on what is different in the rows of two states."""
    sources, others = before["sources"], now["sources"]
    if len(sources) != len(others):
        return [f"data: {_plural(len(sources), 'source')} -> {_plural(len(others), 'source')}"]
    lines = []
    for old, new in zip(sources, others, strict=True):
        name, read, kept = f"{new['split']} rows of {new['source']}", *_rows(old, new)
        if old["content"] != new["content"]:
            lines.append(f"{name}: the file is another: {read}" if old["read"] != new["read"] else f"{name}: edited")
        elif old["kept"] != new["kept"]:
            lines.append(f"{name}: {kept} are kept")
    if before["labels"] != now["labels"]:
        lines.append(f"labels: {show_value(before['labels'])} -> {show_value(now['labels'])}")
    if before["template"] != now["template"]:
        lines.append("chat template: another one (data.chat_template, data.template_variables or the tokenizer's)")
    return lines


def _rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    read, kept = (f"{old[key]:,} rows -> {new[key]:,}" for key in ("read", "kept"))
    return read, kept


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{ending * (count != 1)}"


def _explain_weights(before: State, now: State) -> list[str]:
    return [f"weights of the base (model.path): fingerprint {before['model'][:12]} -> {now['model'][:12]}"]


def _explain_batches(before: State, now: State) -> list[str]:
    batches, processes = before["batches_per_step"], now["machine"]["processes"]
    specs = [state["recipe"]["training"] for state in (before, now)]
    other = any(
        spec["tokens_per_batch"] == "auto" or spec["tokens_per_step"] or spec["rows_per_step"] for spec in specs
    )
    given = not other and batches % processes == 0
    fix = f"; write training.gradient_accumulation: {batches // processes}" if given else ""
    return [
        f"batches per step: {batches} -> {now['batches_per_step']}, with {_plural(processes, 'process', 'es')}{fix}"
    ]


def _explain_size(before: State, now: State) -> list[str]:
    """Return a line on the batch size where it follows from other keys; else the diff has its key."""
    if any(state["recipe"]["training"]["tokens_per_batch"] != "auto" for state in (before, now)):
        return []
    return [f"training.tokens_per_batch: auto: tokens of a batch: {before['batch_size']:,} -> {now['batch_size']:,}"]


# Values of a state that must stay the same, with the lines that tell how they differ.
FACTS: dict[str, Callable[[State, State], list[str]]] = {
    "model": _explain_weights,
    "dtype": lambda before, now: [f"dtype of the run (model.dtype): {before['dtype']} -> {now['dtype']}"],
    "data": _explain_data,
    "batches_per_step": _explain_batches,
    "batch_size": _explain_size,
    "optimizer": lambda before, now: [f"optimizer of the run: {before['optimizer']} -> {now['optimizer']}"],
}
