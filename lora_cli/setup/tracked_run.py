"""What a run's trackers get of it (`tracking/config.json`), which packages they need, and what `lora check` says."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.recipe.problem import join_words
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.tracking_section import PROJECT, TrackingSpec, facts_of
from lora_cli.run import atomic
from lora_cli.run.folder import RunFolder
from lora_cli.run.redact import redact_address, redact_values, without_private


def check_trackers_installed(spec: TrackingSpec | None) -> None:
    """Check that the packages of the trackers are installed, without importing them.

    Raises:
        LoraError: one is not.
    """
    missing = [name for name in spec.to if not is_installed(name)] if spec else []
    if missing:
        packages = " ".join(facts_of(name).install for name in missing)
        names = join_words(list(missing), "and")
        raise LoraError(
            f"tracking.to: {names} {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"{Path(sys.executable).name} -m pip install {packages}",
        )


def is_installed(tracker: str) -> bool:
    """Return whether Python finds the package of a tracker."""
    found = find_spec(facts_of(tracker).module)
    # Without an origin, it is a folder that a tracker has left in the working folder: `wandb/`.
    return found is not None and found.origin is not None


def write_tracked_config(run: RunFolder, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """Write what the trackers get as the configuration of a run: its resolved recipe, and the manifest.

    Paths are without the folders of this machine, and addresses without passwords. Environment variables, the arguments
    of the command and the texts of rows are not in it.

    Raises:
        OSError: it cannot be written.
    """
    if recipe.tracking is None:
        return
    run.tracking.mkdir(exist_ok=True)
    config = {"recipe": recipe.model_dump(mode="json"), **without_private(manifest)}
    atomic.write_json(run.tracking / "config.json", redact_values(config))


def describe_tracking(recipe: Recipe) -> list[str]:
    """Return lines on what would be tracked where; none without trackers."""
    spec = recipe.tracking
    if spec is None:
        return []
    return [f"tracking: {name}{_where(name, spec, recipe)}" for name in spec.to]


def _where(name: str, spec: TrackingSpec, recipe: Recipe) -> str:
    facts = facts_of(name)
    files = "" if not spec.artifacts else "; with model card, recipe, manifest and metrics"
    if not facts.artifacts and spec.artifacts:
        files = f"; {name} stores no files, so artifacts are not sent to it"
    folder = f"{recipe.output}/tracking"
    if name == "tensorboard":
        return f", into {folder}/tensorboard{files}"
    project = spec.project or (f"{PROJECT}, or {facts.project_variable}" if facts.project_variable else PROJECT)
    owner = f"{spec.entity}/" if spec.entity and facts.entity else ""
    run = spec.name or Path(recipe.output).name
    store = ""
    if name == "mlflow":
        store = f", at {redact_address(spec.server)}" if spec.server else ", at MLFLOW_TRACKING_URI, else a local store"
    if name == "trackio":
        store = f", at {spec.space}" if spec.space else ", at TRACKIO_SPACE_ID, else this machine's store"
    if facts.offline:
        store = f", offline, into {folder}" if spec.offline else ", online"
    return f", project {owner}{project}, run {run}{store}{files}"
