"""The damages that other tests use: each changes its copy, is the same for the same seed, and has a name of its own."""

import shutil
from pathlib import Path

import pytest

from tests.faults.damage import Damage, damages


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    folder = tmp_path / "intact"
    (folder / "below").mkdir(parents=True)
    (folder / "a.json").write_text('{"a": 1}' * 2000)
    (folder / "below" / "b.bin").write_bytes(bytes(range(1, 256)) * 40)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    return folder


def contents(path: Path) -> list[tuple[str, str, bytes]]:
    """Return what is at `path`: names, kinds and bytes."""
    found = []
    for entry in sorted([path, *path.rglob("*")]):
        kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
        found.append((entry.relative_to(path).as_posix(), kind, entry.read_bytes() if entry.is_file() else b""))
    return found


def apply(damage: Damage, intact: Path, copy: Path) -> list[tuple[str, str, bytes]]:
    for old in (copy, copy.with_name(f"{copy.name}.outside")):
        if old.is_symlink() or old.is_file():
            old.unlink()
        elif old.is_dir():
            shutil.rmtree(old)
    shutil.copytree(intact, copy)
    damage.apply(copy)
    return contents(copy)


def test_each_damage_changes_its_copy_only_and_is_repeatable(intact: Path, other: Path, tmp_path: Path):
    before = contents(intact)
    found = list(damages(intact, seed=3, other=other, repeats=2))
    names = [damage.name for damage in found]
    assert len(set(names)) == len(names) > 35
    again = {damage.name: damage for damage in damages(intact, seed=3, other=other, repeats=2)}
    for damage in found:
        damaged = apply(damage, intact, tmp_path / "copy")
        assert damaged != before, damage.name
        assert apply(again[damage.name], intact, tmp_path / "copy") == damaged, damage.name
    assert contents(intact) == before


def test_another_seed_damages_other_places(intact: Path, tmp_path: Path):
    flips = [
        apply(damage, intact, tmp_path / "copy")
        for seed in (1, 2)
        for damage in damages(intact, seed=seed, kinds=["flip-bit"])
    ]
    assert len(flips) == 4
    assert flips[0] != flips[2]


def test_a_single_file_is_damaged_by_its_own_path(intact: Path, tmp_path: Path):
    copy = tmp_path / "copy.json"
    for damage in damages(intact / "a.json", seed=1, kinds=["truncate", "link-in-place", "remove"]):
        shutil.copyfile(intact / "a.json", copy)
        damage.apply(copy)
        assert "a.json" in damage.name
        assert copy.is_symlink() or not copy.exists() or copy.read_bytes() != (intact / "a.json").read_bytes()
