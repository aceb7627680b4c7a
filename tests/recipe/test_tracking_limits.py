"""The limits of names and tags are those of the installed trackers."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_cli.recipe.tracking_limits import LIMITS, check_limits
from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec

TEXTS = (
    *("a", "a b", "a/b", "a//b", "a/", "/a", "./a", "a/./b", "a/../b", "..a", "a..", ".a", ".", "..", "a:b", "a,b"),
    *(
        "a'b",
        'a"b',
        "a#b",
        "a?b",
        "a%b",
        "a\\b",
        "a_system",
        "_system",
        "a_artifacts",
        "a_artifact_versions",
        "é",
        "日本",
    ),
    *("registry-a", "a-registry-b", *("x" * length for length in (64, 65, 128, 129, 250, 251, 500, 501))),
    *("a_configs", "a_traces", "a_artifact_aliases", "a_run_artifact_links", "a_metrics"),
)


def refused_here(tracker: TrackerName, key: str) -> set[str]:
    values: dict[str, Any] = {text: {key: [text] if key == "tags" else text} for text in TEXTS}
    return {
        text
        for text, value in values.items()
        if list(check_limits(TrackingSpec.model_validate({"to": [tracker], **value})))
    }


def refused_by(check: Callable[[str], object], *errors: type[Exception]) -> set[str]:
    found = set()
    for text in TEXTS:
        try:
            check(text)
        except errors:
            found.add(text)
    return found


@pytest.mark.slow
def test_wandb():
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    errors = (ValueError, wandb.errors.UsageError)
    assert refused_here("wandb", "project") == refused_by(lambda text: wandb.Settings(project=text), *errors)
    assert refused_here("wandb", "tags") == refused_by(lambda text: wandb.Settings(run_tags=[text]), *errors)
    assert set(LIMITS["wandb"]) == {"project", "tags"}


@pytest.mark.slow
def test_mlflow(tmp_path: Any):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.utils import validation

    error = mlflow.exceptions.MlflowException
    assert refused_here("mlflow", "tags") == refused_by(lambda text: validation._validate_tag(text, "true"), error)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/a.db")

    def find(text: str) -> None:  # as Accelerate does
        client.search_experiments(filter_string=f"name = '{text}'")
        validation._validate_experiment_name(text)

    assert refused_here("mlflow", "project") == refused_by(find, error)


@pytest.mark.slow
def test_trackio():
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    assert refused_here("trackio", "project") == refused_by(SQLiteStorage.validate_project_name, ValueError)
