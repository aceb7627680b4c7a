"""Checkpoints are verified before they are loaded: damaged ones are named and set aside, and do not count."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.run.checksums import verified_folder
from lora_cli.training.checkpoint_folders import (
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    set_aside_damaged,
)


def make(folder: Path, *steps: int) -> list[Path]:
    for step in steps:
        with verified_folder(checkpoint_folder(folder, step), kind="checkpoint", published=False, replace=False) as new:
            (new / "adapter_model.safetensors").write_bytes(bytes(range(200)) + bytes([step % 256]))
            (new / "optimizer.safetensors").write_bytes(bytes(300) + bytes([step % 256]))
            (new / "state.json").write_text(json.dumps({"step": step}))
    return [checkpoint_folder(folder, step) for step in steps]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_step(path: Path) -> None:
    """Change the step, and write checksums that fit."""
    (path / "state.json").write_text('{"step": 3}')
    (path / "checksums.json").unlink()
    copy = path.with_name("copy")
    path.rename(copy)
    with verified_folder(path, kind="checkpoint", published=False, replace=False) as new:
        shutil.copytree(copy, new, dirs_exist_ok=True)
    shutil.rmtree(copy)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda c: flip(c / "optimizer.safetensors"), "optimizer.safetensors has other contents"),
    "truncated": (lambda c: os.truncate(c / "optimizer.safetensors", 9), "optimizer.safetensors has 9 bytes, not 301"),
    "emptied": (lambda c: os.truncate(c / "state.json", 0), "state.json has 0 bytes, not 11"),
    "removed": (lambda c: (c / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "folder in its place": (lambda c: replace_by_folder(c / "state.json"), "state.json is a folder"),
    "no checksums": (lambda c: (c / "checksums.json").unlink(), "it has no checksums.json of a checkpoint"),
    "checksums emptied": (lambda c: os.truncate(c / "checksums.json", 0), "checksums.json is not JSON"),
    "checksums cut": (lambda c: (c / "checksums.json").write_text("{}"), "it has no checksums.json of a checkpoint"),
    "file of another": (
        lambda c: shutil.copy(c.with_name("step-00000002") / "optimizer.safetensors", c),
        "optimizer.safetensors has other contents",
    ),
    "another step": (edit_step, "it is of step 3"),
    "empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "it has no checksums.json of a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_is_taken(damage: str, tmp_path: Path):
    before, newest = make(tmp_path, 2, 4)
    change, message = DAMAGES[damage]
    change(newest)
    lines: list[str] = []
    assert set_aside_damaged(tmp_path, info=lines.append) == before
    assert len(lines) == 1
    assert lines[0].startswith(f"{newest} is damaged: ")
    assert message in lines[0]
    assert lines[0].endswith("; set aside as damaged-step-00000004-1")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert (tmp_path / "damaged-step-00000004-1").is_dir()


def test_without_an_undamaged_checkpoint_there_is_none(tmp_path: Path):
    for number in (1, 2):
        for path in make(tmp_path, 2, 4):
            flip(path / "state.json")
        assert set_aside_damaged(tmp_path, info=lambda _: None) is None
        assert len(list(tmp_path.iterdir())) == 2 * number


def test_other_entries_are_no_checkpoints(tmp_path: Path):
    make(tmp_path, 2, 100_000_000)
    (tmp_path / "step-best").mkdir()
    (tmp_path / "step-best" / "state.json").write_text("{}")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-99999999").symlink_to("step-00000002")
    (tmp_path / "damaged-step-00000004-1").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_pruning_counts_only_undamaged_checkpoints(tmp_path: Path):
    make(tmp_path, 1, 2, 3, 4, 5)
    flip(tmp_path / "step-00000004" / "state.json")
    lines: list[str] = []
    prune_checkpoints(tmp_path, 2, info=lines.append, best=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001", "damaged-step-00000004-1", "step-00000003", "step-00000005",
    }  # fmt: skip
    assert len(lines) == 1
