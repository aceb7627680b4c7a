"""Commands with models and datasets of a hub that does not answer: one error, or the files in the cache."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_cli.run import hub
from tests.commands.conftest import Lora, WriteRecipe
from tests.run.test_hub import answering, online, refused, silent

__all__ = ["answering", "online", "refused", "silent"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("key", ["model.path", "data.train"])
def test_a_command_names_what_was_tried_and_how_to_work_offline(
    key: str, refused: str, recipe: WriteRecipe, lora: Lora
):
    recipe({key: "org/name"})
    result = lora("check", "recipe.yaml")
    assert result.code == 2
    assert result.last_two == [
        f"error: {key.removesuffix('.train')}: org/name is not in the cache, and the hub does not answer (asked "
        f"twice): {refused}: Connection refused",
        "hint: check org/name, the network and HF_ENDPOINT; to work offline, run `hf download org/name` where there is "
        "a network, and copy the folder that it prints to this machine",
    ]


def test_a_model_in_the_cache_is_used_without_the_hub(
    refused: str, recipe: WriteRecipe, lora: Lora, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40)).symlink_to(tiny_folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe({"model.path": "org/name"})
    result = lora("check", "recipe.yaml")
    assert result.code == 0, result.err
    assert hub.USING_CACHE in result.err


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a fraction of the seconds: the tests of `tests/run/test_hub.py` measure them."""
    for name in ("FIRST_ANSWER_S", "LAST_ANSWER_S", "PAUSE_S"):
        monkeypatch.setattr(hub, name, getattr(hub, name) / 10)


COMMANDS = {
    "model": ("check recipe.yaml", {"model.path": "org/name"}),
    "rows": ("check recipe.yaml", {"data.train": "org/name"}),
    "export": ("export org/name --to safetensors --out out", {}),
}
ANSWERS = {
    "silent": "and the hub does not answer",
    "refused": "and the hub does not answer",
    "503": "and the hub does not answer",
    "401": "org/name",
    "404": "org/name",
    "offline": "org/name",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_repository_that_cannot_be_reached_is_an_error_within_seconds(
    answer: str, command: str, recipe: WriteRecipe, lora: Lora, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    if answer.isdecimal():
        monkeypatch.setattr(request.getfixturevalue("answering"), "code", int(answer))
    elif answer == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        request.getfixturevalue(answer)
    line, changes = COMMANDS[command]
    recipe(changes)
    start = time.monotonic()
    result = lora(*line.split())
    assert time.monotonic() - start < 5
    assert result.code == 2
    error, hint = result.last_two
    assert error.startswith("error: ")
    assert ANSWERS[answer] in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("target", ["runs/none", "runs/none/adapter", "./none", "/none/at/all", "elsewhere/none"])
def test_a_path_that_does_not_exist_is_no_hub_id(target: str, workdir: Path, lora: Lora):
    """No hub is asked: a run beside `elsewhere/none` tells that this is a path, too."""
    (workdir / "elsewhere" / "one").mkdir(parents=True)
    (workdir / "elsewhere" / "one" / ".lora-lock").touch()
    result = lora("export", target, "--to", "safetensors", "--out", "out")
    assert result.code == 2
    assert result.err.splitlines() == [
        f"error: {target} does not exist",
        "hint: give a run, an adapter or a model: a folder, a .gguf file or a hub id",
    ]
