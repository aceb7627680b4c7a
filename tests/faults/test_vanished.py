"""Folders that are removed or renamed while a command runs: one line, and nothing is made in their place."""

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.commands.conftest import CommandResult, Lora
from tests.faults.file_operations import before_operation, count_operations
from tests.faults.test_disk import OUTPUTS

pytestmark = pytest.mark.slow
SEED = 3
POINTS = 4  # for each command and target


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def rename(path: Path) -> None:
    if path.exists():
        path.rename(path.with_name(f"{path.name}.moved"))


@pytest.fixture
def fresh(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes the working folder, the base in it and the cache what they were."""
    monkeypatch.chdir("/")
    saved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-saved"))
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))

    def restore() -> None:
        os.chdir("/")
        for path in (tmp_path, tmp_path.with_name(f"{tmp_path.name}.moved")):
            remove(path)
        shutil.copytree(saved, tmp_path)
        os.chdir(tmp_path)
        Path("out").mkdir()

    return restore


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in ("train", "merge", "resize") for target in ("out", "base", ".", "runs/a")]
    + [("gguf", "out")],
)
def test_a_folder_that_vanishes_ends_the_command_in_one_line(
    fresh: Callable[[], None], lora: Lora, tmp_path: Path, name: str, target: str
):
    results: list[CommandResult] = []

    def run() -> None:
        results.append(lora(*OUTPUTS[name]))

    fresh()
    count = count_operations(run)
    assert results[-1].code == 0, results[-1].err
    chosen = random.Random(f"{SEED} {name} {target}")
    for number, vanish in zip(chosen.sample(range(1, count), POINTS), [remove, rename] * POINTS, strict=False):
        fresh()
        place = tmp_path / target
        with before_operation(number, partial(vanish, place)):
            run()
        result, case = results[-1], f"{vanish.__name__} {target} before operation {number}"
        assert result.code in (0, 1, 2), case
        assert "Traceback" not in result.err, case
        assert "Exception ignored" not in result.err, case
        if result.code:
            assert result.last_two[0].startswith("error: "), case
            assert result.last_two[1].startswith("hint: "), case
            assert ".tmp-" not in result.last_two[0], case
        if vanish is remove and target in ("out", ".") and result.code:
            assert not place.exists() or target == ".", case


def test_a_run_goes_on_without_its_base_and_its_cache(fresh: Callable[[], None], lora: Lora, finished_run: Path):
    from lora_cli.commands.train import Training
    from lora_cli.training.tracking import Tracking

    fresh()
    take_steps = Training.take_steps

    def without(self: Training, done: int, trackers: Tracking) -> int:
        for path in ("base", "cache", "rows.jsonl", "runs/a"):
            remove(Path(path))
        return take_steps(self, done, trackers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "take_steps", without)
        result = lora(*OUTPUTS["train"])
    assert result.code == 0, result.err
    name = "adapter/adapter_model.safetensors"
    assert (Path("out/x") / name).read_bytes() == (finished_run / name).read_bytes()
