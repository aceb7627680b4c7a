"""Names of models and datasets that can be neither a path nor a hub id: one error, whether there is a hub or not."""

import json
import re
from pathlib import Path

import pytest

from tests.commands.conftest import CommandResult, Lora, WriteRecipe
from tests.run.test_hub import online, refused

__all__ = ["online", "refused"]  # fixtures

NAMES = ("x y", "--x", "ä/b", "org/name:main", "a--b", "x" * 97, "x" * 300, "org/" + "x" * 5000, "a@b")


def check_error(result: CommandResult, message: str) -> None:
    error, hint = result.last_two
    assert result.code == 2
    assert re.match(f"error: .*{message}", error), error
    assert len(error) < 400
    assert hint.startswith("hint: ")
    assert "HF_HUB_OFFLINE" not in hint


@pytest.mark.parametrize("hub", ["refused", "offline"])
@pytest.mark.parametrize("name", NAMES, ids=[name[:20] for name in NAMES])
def test_a_name_that_cannot_be_a_hub_id(
    name: str,
    hub: str,
    recipe: WriteRecipe,
    lora: Lora,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    """Where the hub was asked for it, there was a traceback; where it was not, the hint was to ask it."""
    recipe()
    if hub == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        request.getfixturevalue(hub)
    for command, key in (
        ("check", "model.path"),
        ("train", "model.path"),
        ("check", "data.train"),
        ("train", "data.eval"),
    ):
        result = lora(command, "recipe.yaml", "--set", f"{key}={json.dumps(name)}")
        check_error(result, "is not a (file or )?folder, and cannot be a hub id")
    commands = [("chat", "base", "--base", name), ("export", "--to", "gguf", "--out", "o.gguf", "--", name)]
    for options in commands[: 1 if len(name) > 255 else 2]:  # a path of `lora export` is compared with its --out first
        check_error(lora(*options), r"(model\.path|--base|MODEL): .* is not a folder, and cannot be a hub id")


@pytest.mark.parametrize(
    "command",
    ["export", "chat", "adapter convert"],
)
def test_an_empty_name_of_a_model(command: str, workdir: Path, lora: Lora):
    arguments = {
        "export": ("", "--to", "gguf", "--out", "o.gguf"), "chat": ("base", "--base", ""),
        "adapter convert": ("base", "--base", "", "--out", "o"),
    }[command]  # fmt: skip
    check_error(lora(*command.split(), *arguments), "is empty")
