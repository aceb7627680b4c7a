"""`lora train` with trackers: what W&B (offline), TensorBoard, an MLflow server and trackio have of a resumed run."""

import ast
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lora_cli.recipe.tracking_section import TRACKERS
from lora_cli.run.metrics_log import read_metrics
from lora_cli.setup import evaluations, tracked_run
from tests.commands.conftest import Lora, WriteRecipe
from tests.support import tracked

TESTED = ("tensorboard", "wandb", "mlflow", "trackio")
INSTALLED = [name for name in TESTED if tracked_run.is_installed(name)]
TOKEN = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", TESTED)
def test_the_package_is_installed(name: str):
    if name not in INSTALLED:
        pytest.skip(f"{TRACKERS[name].install} is not installed: the test of a tracked run leaves {name} out")


def expected_points(run: Path) -> tracked.Points:
    """Return what each tracker should have, from the metrics log."""
    points: tracked.Points = {}
    for record in read_metrics(run / "metrics.jsonl"):
        kind = "eval" if "eval_loss" in record else "train"
        for key, value in record.items():
            if key != "step":
                points.setdefault(f"{kind}/{key.removeprefix('eval_')}", []).append((record["step"], value))
    return points


def steps_of(points: tracked.Points) -> dict[str, list[int]]:
    return {key: [step for step, _ in values] for key, values in points.items()}


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_tracked_runs(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The first start is stopped within the evaluation after step 2, which the resumed run makes again."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {"HOME": home, "TRACKIO_DIR": home / "trackio", "WANDB_API_KEY": TOKEN}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    measure, calls = evaluations.measure_likelihood, []

    def send_signal(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)
        return measure(*arguments, **options)

    with ExitStack() as stack:
        tracking: dict[str, Any] = {"to": INSTALLED, "project": "tiny", "tags": ["first"], "artifacts": True}
        if "mlflow" in INSTALLED:
            tracking["server"] = stack.enter_context(tracked.mlflow_server(home))
        if "wandb" in INSTALLED:
            tracking["offline"] = True
        recipe({"tracking": tracking, "model.path": str(tmp_path / "base")})
        checked = lora("check", "recipe.yaml")
        with monkeypatch.context() as patch:
            patch.setattr(evaluations, "measure_likelihood", send_signal)
            stopped = lora("train", "recipe.yaml")
        resumed = lora("train", "recipe.yaml", "--resume")
        assert (checked.code, stopped.code, resumed.code) == (0, 143, 0), checked.err + stopped.err + resumed.err
        run = Path("runs/a")
        stored = {
            "tensorboard": lambda: [tracked.tensorboard_run(run / "tracking" / "tensorboard")],
            "wandb": lambda: [tracked.wandb_run(file) for file in sorted(run.glob("tracking/wandb/offline-*/*.wandb"))],
            "mlflow": lambda: [
                tracked.mlflow_run(tracking["server"], each) for each in tracked.mlflow_runs(tracking["server"], "tiny")
            ],
            "trackio": lambda: [tracked.trackio_run(home / "trackio", "tiny")],
        }
        found = {name: stored[name]() for name in INSTALLED}
    expected = expected_points(run)
    for name in INSTALLED:
        assert f"tracking: {name}, " in checked.out
        assert f"{name}: tracked " in stopped.err
        assert f"{name}: 1 of 2 steps and 1 evaluation sent; the last one follows on --resume" in stopped.err
        assert f"{name}: goes on " in resumed.err
        assert f"{name}: 3 steps and 2 evaluations sent" in resumed.err
        points: tracked.Points = {}
        for part in found[name]:
            for key, values in part.points.items():
                points.setdefault(key, []).extend(values)
        assert steps_of(points) == steps_of(expected), name
        for key, values in expected.items():
            assert [v for _, v in points[key]] == pytest.approx([v for _, v in values]), (name, key)
        config = "\n".join(part.config for part in found[name])
        assert "max_length" in config
        assert "bitsandbytes" in config
        assert str(tmp_path) not in config
        assert TOKEN not in config
    files = ["README.md", "manifest.json", "metrics.jsonl", "recipe.yaml"]
    if "wandb" in INSTALLED:
        first, second = found["wandb"]
        assert (first.exit_code, second.exit_code) == (130, 0)
        assert (first.files, second.files) == ([], files)
        kept = b"".join(map(tracked.wandb_bytes, run.glob("tracking/wandb/offline-*/*.wandb")))
        assert str(tmp_path).encode() not in kept
        assert TOKEN.encode() not in kept
    if "mlflow" in INSTALLED:
        assert found["mlflow"][0].files == files
    assert json.loads((run / "tracking" / "config.json").read_text())["recipe"]["model"]["path"] == "base"


def test_a_tracker_that_is_not_installed_is_refused_before_the_model(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracked_run, "find_spec", lambda name: None)
    recipe({"tracking": {"to": ["wandb", "comet_ml"]}, "model.path": "missing"})
    for command in ("train", "check"):
        result = lora(command, "recipe.yaml")
        assert result.code == 2
        assert result.last_two == [
            "error: tracking.to: wandb and comet_ml are not installed",
            f"hint: {Path(sys.executable).name} -m pip install wandb comet_ml",
        ]
    assert not Path("runs").exists()


def test_a_folder_of_a_tracker_is_not_taken_for_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "swanlab").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tracked_run.is_installed("swanlab") or "site-packages" in str(tracked_run.find_spec("swanlab"))


def test_only_the_process_of_a_tracker_imports_its_package():
    root = Path(tracked_run.__file__).parents[1]
    modules = {facts.module for facts in TRACKERS.values()}
    importers: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [f"{node.module}", *(f"{node.module}.{a.name}" for a in node.names)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                importers.setdefault(name, set()).add(file.name)
    assert set().union(*(importers.get(name, set()) for name in modules)) == {"trackers.py"}
    assert importers["lora_cli.training.trackers"] == {"tracker_process.py"}
    assert not [name for name in importers if name.startswith("lora_cli.training.tracker_process")]
