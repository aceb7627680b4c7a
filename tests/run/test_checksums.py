"""Checksums of a folder find every changed, missing, added-in-place or replaced file."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, read_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "sub" / "text.txt").write_text("text")
    write_checksums(folder, kind="adapter", published=True)
    return folder


def test_an_unchanged_folder_has_no_damage(folder: Path):
    assert find_damage(folder) == []
    record = read_checksums(folder)
    assert record is not None
    assert record.kind == "adapter"
    assert sorted(record.files) == ["sub/text.txt", "weights.bin"]
    assert record.files["sub/text.txt"].sha256 == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"


def test_a_folder_without_checksums_is_not_compared(tmp_path: Path):
    assert read_checksums(tmp_path) is None
    (tmp_path / CHECKSUMS_FILE).write_text('{"tool": "another"}')
    assert find_damage(tmp_path) == []


def test_each_kind_of_damage_is_named(folder: Path):
    weights = folder / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert find_damage(folder) == ["weights.bin has 5,119 bytes, not 5,120"]
    weights.unlink()
    assert find_damage(folder) == ["weights.bin is missing"]
    weights.mkdir()
    assert find_damage(folder) == ["weights.bin is a folder"]
    weights.rmdir()
    (folder.parent / "copy").write_bytes(data)
    weights.symlink_to(folder.parent / "copy")
    assert find_damage(folder) == ["weights.bin is a link, not a file"]
    assert find_damage(folder, ["sub/text.txt", "unknown"]) == []
    weights.unlink()
    os.mkfifo(weights)
    assert find_damage(folder) == ["weights.bin is no file"]


@settings(deadline=None)
@given(at=st.integers(0, 5119), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("flip")
    data = bytearray(range(256)) * 20
    (folder / "weights.bin").write_bytes(data)
    write_checksums(folder, kind="checkpoint", published=False)
    data[at] ^= 1 << bit
    (folder / "weights.bin").write_bytes(data)
    assert find_damage(folder) == ["weights.bin has other contents than when it was written"]


@pytest.mark.parametrize(
    "record",
    [
        [], {"tool": "lora-cli"}, {"tool": "lora-cli", "kind": "adapter", "files": []},
        {"tool": "lora-cli", "kind": "adapter", "files": {"a": 1}},
        {"tool": "lora-cli", "kind": "adapter", "files": {"../a": {"bytes": 1, "xxh3": ""}}},
        {"tool": "lora-cli", "kind": "adapter", "files": {"/etc/a": {"bytes": 1, "xxh3": ""}}},
        {"tool": "lora-cli", "kind": "adapter", "files": {"a": {"bytes": True, "xxh3": ""}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_refused(record: object, tmp_path: Path):
    (tmp_path / CHECKSUMS_FILE).write_text(json.dumps(record))
    with pytest.raises(LoraError, match=r"checksums\.json"):
        find_damage(tmp_path)


def test_checksums_of_a_folder_that_cannot_be_listed_are_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    before = (folder / CHECKSUMS_FILE).read_bytes()
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError):
        write_checksums(folder, kind="export", published=True)
    assert (folder / CHECKSUMS_FILE).read_bytes() == before
