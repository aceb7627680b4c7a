"""Logs, manifest and recipe of a run that are damaged before a resume or while it runs: told, and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.commands.train import Training
from lora_cli.training.tracking import Tracking
from tests.commands.conftest import CommandResult, Lora
from tests.faults.damage import damages

pytestmark = pytest.mark.slow
SEED = 5
FILES = ("metrics.jsonl", "manifest.json", "recipe.yaml")
KINDS = ("flip-bit", "truncate", "empty", "zero-block", "remove", "folder-in-place", "fifo-in-place")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def half_run(trained_run: Path) -> Path:
    """A run whose last two of four steps are to be done again."""
    shutil.rmtree(trained_run / "adapter")
    shutil.rmtree(trained_run / "checkpoints" / "step-00000004")
    (trained_run / "checksums.json").unlink()
    return trained_run


def check_complete(result: CommandResult, run: Path, expected: Path, name: str) -> None:
    assert result.code == 0, (name, result.err)
    assert "Traceback" not in result.err, name
    assert (run / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes(), name
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["result"] == json.loads((expected / "manifest.json").read_text())["result"], name
    card = (run / "adapter" / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith(("| base", "| adapter"))]
    assert [line.split("|")[2] for line in table] == [
        line.split("|")[2]
        for line in (expected / "adapter" / "README.md").read_text().splitlines()
        if line.startswith(("| base", "| adapter"))
    ], name
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line), name


@pytest.mark.parametrize("file", FILES)
def test_a_run_with_a_damaged_file_is_resumed(
    half_run: Path, finished_run: Path, lora: Lora, file: str, tmp_path: Path
):
    intact = Path(shutil.copytree(half_run, tmp_path / "intact"))
    for damage in damages(intact / file, seed=SEED, kinds=KINDS):
        shutil.rmtree(half_run)
        shutil.copytree(intact, half_run)
        damage.apply(half_run / file)
        ends_later = file == "metrics.jsonl" and damage.name.startswith("truncate")
        # Behind the records of steps 1 and 2, which are kept: those after it are made again.
        ends_later = ends_later and (half_run / file).read_bytes().count(b"\n") >= 3
        result = lora("train", "recipe.yaml", "--resume")
        check_complete(result, half_run, finished_run, damage.name)
        kind = damage.name.split()[0]
        # A flipped bit can leave JSON. Recipe and manifest are written anew; the log has no checksums, and nothing but
        # the accuracies in the model card is read from it. The run's recipe is set aside only if it is no text file.
        silent = kind == "flip-bit" or (kind == "remove" and file != "metrics.jsonl")
        silent = silent or ends_later or (file == "recipe.yaml" and not kind.endswith("in-place"))
        told = [line for line in result.err.splitlines() if line.startswith(f"runs/a/{file} ")]
        assert silent or len(told) == 1, (damage.name, result.err)


def damaged_after(step: int, damage: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `damage` happen right after the checkpoint of `step`."""
    save = Training._save_checkpoint

    def saving(self: Training, number: int) -> None:
        save(self, number)
        if number == step:
            damage()

    monkeypatch.setattr(Training, "_save_checkpoint", saving)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["empty", "zero-block", "remove", "folder-in-place"])
def test_a_file_that_is_damaged_while_a_run_goes_on_loses_no_result(
    finished_run: Path, recipe, lora: Lora, monkeypatch: pytest.MonkeyPatch, file: str, kind: str
):
    recipe()
    (damage,) = damages(finished_run / file, seed=SEED, kinds=[kind])
    damaged_after(2, lambda: damage.apply(Path("runs/a") / file), monkeypatch)
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    run = Path("runs/a")
    assert (run / ADAPTER).is_file()
    assert json.loads((run / "manifest.json").read_text())["result"]["steps_done"] == 4
    assert "eval loss 7.9420 -> 7.7525" in result.err
    if file == "metrics.jsonl":
        assert len([line for line in result.err.splitlines() if line.startswith("runs/a/metrics.jsonl ")]) == 1


RECORDS = ("metrics.jsonl", "manifest.json", "recipe.yaml", "checksums.json")


@pytest.mark.parametrize("name", RECORDS)
def test_a_changed_file_of_a_finished_run_is_told_by_each_command(name: str, trained_run: Path, lora: Lora):
    file = trained_run / name
    text = file.read_bytes()
    if name == "checksums.json":  # a digest, not a size, which varies
        start = text.index(b'"xxh3": "') + len(b'"xxh3": "')
        file.write_bytes(text[:start] + (b"1" if text[start : start + 1] == b"0" else b"0") + text[start + 1 :])
    else:
        file.write_bytes(text.replace(b"0", b"1", 1))
    for command in (["eval", "runs/a"], ["merge", "runs/a", "--out", "out"], ["train", "recipe.yaml", "--resume"]):
        result = lora(*command)
        assert result.code == 0, result.err
        told = [line for line in result.err.splitlines() if line.startswith("note: this run is not as it was")]
        assert len(told) == 1, result.err
        assert "other contents" in told[0] if name == "checksums.json" else name in told[0], told
    assert "not as it was" not in lora("eval", "runs/a").err  # the resumed run has ended again


def test_a_damaged_recipe_of_a_finished_run_is_an_error_that_says_so(trained_run: Path, lora: Lora):
    file = trained_run / "recipe.yaml"
    file.write_bytes(file.read_bytes()[:-40] + b"\x8d")
    result = lora("eval", "runs/a")
    assert result.code == 2
    assert result.last_two == [
        "error: 1 problem in runs/a/recipe.yaml",
        "hint: runs/a/recipe.yaml is not as it was when this run ended: restore it from a copy",
    ]


def test_an_adapter_without_its_checksums_is_told(trained_run: Path, lora: Lora):
    (trained_run / "adapter" / "checksums.json").unlink()
    result = lora("merge", "runs/a", "--out", "out")
    assert result.code == 0
    assert "note: this run is not as it was when it ended: adapter/checksums.json is missing" in result.err.splitlines()


def test_a_run_that_goes_on_has_no_checksums_of_its_end(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    assert (trained_run / "checksums.json").is_file()
    seen: list[bool] = []
    steps = Training.take_steps

    def look(self: Training, done: int, trackers: Tracking) -> int:
        seen.append((trained_run / "checksums.json").exists())
        return steps(self, done, trackers)

    monkeypatch.setattr(Training, "take_steps", look)
    assert lora("train", "recipe.yaml", "--resume").code == 0
    assert seen == [False]
    assert (trained_run / "checksums.json").is_file()
