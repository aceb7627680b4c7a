"""The check for free space adds what goes to one disk, and names what is needed and what is free."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_cli.errors import LoraError
from lora_cli.run import disk_space
from lora_cli.run.disk_space import Need, check_free_space, written_bytes


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let every disk have 1,000,000 free bytes."""
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, free=1_000_000))
    return 1_000_000


def test_needs_on_one_disk_are_added_up(free: int, tmp_path: Path):
    run, cache = tmp_path / "runs/a", tmp_path / "cache"
    check_free_space([Need(run, 600_000, "3 checkpoints"), Need(cache, 400_000, "the encoded rows")])
    assert not run.exists()
    with pytest.raises(LoraError) as caught:
        check_free_space([Need(run, 600_000, "3 checkpoints"), Need(cache, 400_001, "the encoded rows")])
    assert caught.value.message == (
        f"{run}: 977 KiB (1,000,001 bytes) are needed for 3 checkpoints (586 KiB) and the encoded rows (391 KiB), "
        "and 977 KiB (1,000,000 bytes) are free"
    )
    assert caught.value.exit_code == 1
    assert caught.value.hint == "free some space, or choose a folder on another disk"


def test_one_need_is_named_without_its_size(free: int, tmp_path: Path):
    with pytest.raises(LoraError, match=r"out: 3 MiB \(3,000,000 bytes\) are needed for the merged model, and 977 KiB"):
        check_free_space([Need(tmp_path / "out", 3_000_000, "the merged model")])


def test_a_disk_that_reports_no_size_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_free_space([Need(tmp_path, 1, "a file")])


def test_disks_are_checked_one_by_one(tmp_path: Path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system at /dev/shm")
    here, there = shutil.disk_usage(tmp_path).free, shutil.disk_usage(other).free
    check_free_space([Need(tmp_path / "a", here // 2, "a"), Need(other / "b", there // 2, "b")])


def test_written_bytes_counts_all_files(tmp_path: Path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "below" / "b").write_bytes(b"123")
    os.symlink("/etc/passwd", tmp_path / "link")
    assert written_bytes(tmp_path) == 8 + len("/etc/passwd")
    assert written_bytes(tmp_path / "missing") == 0
