"""Commands with models and datasets of a hub that does not answer: one error, or the files in the cache."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_cli.run import hub
from tests.commands.conftest import Lora, WriteRecipe
from tests.run.test_hub import online, refused

__all__ = ["online", "refused"]  # fixtures
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
