"""Adapters on the command line: runs, checkpoints and `NAME=DIR` with any name, and how each is prompted in chat."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.folder import open_run
from lora_cli.setup.adapter_folders import find_adapter, parse_named_folder
from tests.commands.conftest import Lora, WriteRecipe, remove_checksums


def make_adapter(folder: str) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("folder", "item", "name"),
    [
        ("runs/v1.0/adapter", "runs/v1.0/adapter", "v1.0"),
        ("runs/v1.0/adapter", "runs/v1.0", "v1.0"),
        ("runs/a/checkpoints/step-00000002", "runs/a/checkpoints/step-00000002", "step-00000002"),
        ("mine", "mine", "mine"),
        ("lr=1e-4/adapter", "lr=1e-4", "lr=1e-4"),
        ("lr=1e-4/adapter", "high=lr=1e-4", "high"),
        ("a/adapter", "x=y=a", "x=y"),
        ("a/adapter", "keys=a", "keys"),
        ("a/adapter", "größe 1.0=a", "größe 1.0"),
    ],
)
def test_a_folder_has_the_name_that_the_user_gives_or_its_own(
    folder: str, item: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = make_adapter(folder)
    assert parse_named_folder(item, taken=[]) == (name, path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("=a", "--adapter =a: the name is empty or not printable"),
        ("base=a", "--adapter base=a: the name base is taken"),
        ("one=a", "--adapter one=a: the name one is taken"),
        ("x=none", "--adapter x=none: none does not exist"),
        ("x=.", "--adapter x=.: . has no adapter_config.json"),
    ],
)
def test_a_name_or_folder_that_does_not_fit_is_refused(
    item: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make_adapter("a/adapter")
    with pytest.raises(LoraError) as caught:
        parse_named_folder(item, taken=["one"])
    assert caught.value.message == message


def test_a_run_without_an_adapter_says_whether_it_is_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with open_run("runs/a"), pytest.raises(LoraError, match=r"runs/a has no adapter yet: process \d+ is training it"):
        find_adapter(Path("runs/a"))
    with pytest.raises(LoraError, match="runs/a has no adapter: its training did not finish") as caught:
        find_adapter(Path("runs/a"))
    assert caught.value.hint == "train it again: lora train runs/a/recipe.yaml --fresh"
    checkpoint = make_adapter("runs/a/checkpoints/step-00000002")
    (checkpoint / "state.json").touch()
    with pytest.raises(LoraError) as caught:
        find_adapter(Path("runs/a"))
    assert caught.value.hint == (
        "continue it with lora train runs/a/recipe.yaml --resume, "
        "or use its newest checkpoint, runs/a/checkpoints/step-00000002"
    )


@pytest.mark.slow
def test_chat_prompts_each_adapter_as_its_rows_did(
    trained_run: Path, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"prompt": f"Q: who? {number} A:", "completion": " Paris."} for number in range(8)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_steps": 40, "learning_rate": 2e-2, "save_every": 40, "eval_every": None}
    recipe({"data.train": "text.jsonl", "data.eval": None, "training": training, "output": "runs/v1.0"})
    assert lora("train", "recipe.yaml").code == 0
    assert json.loads(Path("runs/v1.0/adapter/trained_on.json").read_text())["prompts"] == "text"
    assert json.loads(Path("runs/a/adapter/trained_on.json").read_text())["prompts"] == "chat"
    shutil.copytree("runs/v1.0", "runs/keys")
    Path("runs/keys/checksums.json").unlink()
    (remove_checksums(Path("runs/keys/adapter")) / "trained_on.json").unlink()
    lines = ["Q: who? 9 A:", "/compare Q: who? 3 A:", "/reset now", "/use keys", "/use chat", "/system hi", "/use v1.0",
             "/system hi", "/prompt", "/prompt sms", "/prompt chat"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    more = ["--adapter", "runs/keys", "--adapter", "chat=runs/a", "--adapter", "runs/v1.0/checkpoints/step-00000040"]
    result = lora("chat", "runs/v1.0", "--adapter", "runs/v1.0", *more, "--max-new-tokens", "8")
    assert result.code == 0, result.err
    printed = result.out.splitlines()
    assert printed[0] == " Paris."
    assert printed[1].startswith("[base] ")
    assert printed[-1] == "[adapter]  Paris."
    literal = "each line is the whole prompt, without chat template"
    told = [line for line in result.err.splitlines() if "switched in" not in line]
    assert told == [
        f"adapter was trained on literal prompts: {literal} (/prompt chat switches)",
        f"v1.0 was trained on literal prompts: {literal} (/prompt chat switches)",
        "keys has no record of its training rows: prompts use the chat template (/prompt text switches)",
        f"step-00000040 was trained on literal prompts: {literal} (/prompt chat switches)",
        "/reset takes no text, and was not done: 'now' is left over",
        "/system: literal prompts have no system message; /prompt chat uses the chat template",
        literal,
        "/prompt sms: write /prompt chat or /prompt text",
        "prompts use the chat template",
    ]


@pytest.mark.slow
def test_a_run_is_measured_merged_and_inspected_as_its_adapter(trained_run: Path, lora: Lora):
    shutil.copytree("runs/a", "runs/keys")
    shutil.copytree("runs/a", "runs/v1.0")
    measured = lora("eval", "runs/a", "--adapter", "runs/keys", "--adapter", "runs/v1.0")
    assert measured.code == 0, measured.err
    losses = {line.split()[0]: line.split()[1] for line in measured.out.splitlines()[1:5]}
    assert losses["adapter"] == losses["keys"] == losses["v1.0"] != losses["base"]
    assert lora("merge", "runs/a", "--out", "merged").code == 0
    assert lora("adapter", "inspect", "runs/v1.0").out == lora("adapter", "inspect", "runs/v1.0/adapter").out
    assert lora("adapter", "resize", "runs/a", "--rank", "2", "--out", "small").code == 0
    assert lora("adapter", "combine", "runs/a", "0.5*runs/keys", "--out", "sum").code == 0
