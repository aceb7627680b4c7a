"""Trackers of other tools in the recipe's tracking section; tokens and passwords are not shown."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Outcome
from lora_cli.convert.secrets import HIDDEN, hide
from lora_cli.recipe.load import parse_recipe
from tests.convert.minimal import MINIMAL


def conversion(tool: str, **changes: Any) -> Conversion:
    return convert_config(Config(Path("x.yaml"), {**MINIMAL[tool], **changes}), tool)


def tracked(tool: str, **changes: Any) -> dict[str, Any]:
    """The tracking section that the keys become, without defaults; empty if the recipe has none."""
    result = conversion(tool, **changes)
    assert result.to_accept() == []
    spec = parse_recipe(result.text, Path("r.yaml")).tracking
    return {} if spec is None else spec.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        ("axolotl", {"wandb_project": "p", "wandb_mode": "disabled"}, {}),
        ("axolotl", {"wandb_project": "p", "use_wandb": False}, {}),
        ("llama-factory", {"use_swanlab": True, "swanlab_mode": "disabled"}, {}),
        (
            "axolotl",
            {"wandb_project": "p", "wandb_mode": "offline", "wandb_entity": "team"},
            {"to": ["wandb"], "project": "p", "entity": "team", "offline": True},
        ),
        (
            "llama-factory",
            {"use_swanlab": True, "swanlab_mode": "local", "swanlab_workspace": "w", "swanlab_project": "p"},
            {"to": ["swanlab"], "project": "p", "entity": "w", "offline": True},
        ),
        (
            "axolotl",
            {"use_mlflow": True, "mlflow_tracking_uri": "http://host:5000", "wandb_entity": "team"},
            {"to": ["mlflow"], "server": "http://host:5000"},
        ),
        ("axolotl", {"wandb_project": "p", "mlflow_tracking_uri": "http://h:1"}, {"to": ["wandb"], "project": "p"}),
        ("axolotl", {"use_mlflow": True, "mlflow_tracking_uri": "./mlruns"}, {"to": ["mlflow"]}),
        ("trl", {"report_to": "trackio", "trackio_space_id": "a/s"}, {"to": ["trackio"], "space": "a/s"}),
        ("trl", {"report_to": "comet"}, {"to": ["comet_ml"]}),
        ("trl", {"report_to": ["clearml", "wandb"], "run_name": "n"}, {"to": ["wandb"], "name": "n"}),
        ("trl", {"report_to": "neptune"}, {}),
        ("trl", {"report_to": "all"}, {}),
        ("trl", {"report_to": "none"}, {}),
    ],
)
def test_trackers(tool: str, keys: dict[str, Any], expected: dict[str, Any]):
    assert tracked(tool, **keys) == expected


def test_a_tracker_that_is_not_offered_is_named():
    for report_to in ("neptune", ["neptune", "wandb"]):
        (line,) = [line for line in conversion("trl", report_to=report_to).lines if line.key == "report_to"]
        assert "neptune: tracking.to has no tracker of this name" in line.text()
        assert line.outcome in (Outcome.NO_EFFECT, Outcome.CARRIED)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hub_token", "abc", HIDDEN),
        ("token", "abc", HIDDEN),
        ("comet_api_key", "abc", HIDDEN),
        ("swanlab_lark_secret", "abc", HIDDEN),
        ("from_pretrained.token", "abc", HIDDEN),
        ("password", "abc", HIDDEN),
        ("run_name", f"hf_{'a' * 30}", HIDDEN),
        ("launcher", {"HF_TOKEN": "abc", "A": "b"}, {"HF_TOKEN": HIDDEN, "A": "b"}),
        ("mlflow_tracking_uri", "http://me:pass@host:1", f"http://{HIDDEN}host:1"),
        ("eos_token", "</s>", "</s>"),
        ("special_tokens.pad_token", "<pad>", "<pad>"),
        ("token", True, True),
        ("learning_rate", 1e-4, 1e-4),
    ],
)
def test_secrets_are_not_shown(key: str, value: Any, expected: Any):
    assert hide(key, value) == expected


def test_a_server_with_a_password_is_not_written():
    result = conversion("axolotl", use_mlflow=True, mlflow_tracking_uri="http://me:pass@host:1")
    assert "pass@" not in result.text
    assert not any("pass@" in line.text() for line in result.lines)
