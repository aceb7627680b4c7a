"""Atomic writes: a reader finds the complete old or new result, even if the writer was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cli.run import atomic

DEAD_PID = 2**22 + 1  # above the largest process id of Linux


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writes_and_replaces(tmp_path: Path):
    path = tmp_path / "a.json"
    atomic.write_text(path, "old")
    atomic.write_json(path, {"ü": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2.5, None]}
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, {1, 2}])
def test_invalid_json_value_leaves_the_old_file(tmp_path: Path, value: object):
    path = tmp_path / "a.json"
    atomic.write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        atomic.write_json(path, value)
    assert path.read_text() == "1\n"
    assert names(tmp_path) == {"a.json"}


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    atomic.write_text(path, "old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(path, "new")
    with pytest.raises(OSError, match="No space left"), atomic.folder(tmp_path / "b") as new:
        (new / "x").write_text("x")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_folder_appears_complete(tmp_path: Path):
    path = tmp_path / "adapter"
    with atomic.folder(path) as new:
        (new / "deep").mkdir()
        (new / "deep" / "a").write_text("a")
        assert not path.exists()
    assert (path / "deep" / "a").read_text() == "a"
    assert names(tmp_path) == {"adapter"}


def test_failed_folder_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with atomic.folder(tmp_path / "adapter") as new:
            (new / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == set()


def test_folder_is_replaced_only_with_replace(tmp_path: Path):
    path = tmp_path / "adapter"
    for text in ("old", "new"):
        with atomic.folder(path, replace=True) as new:
            (new / text).touch()
    with pytest.raises(FileExistsError), atomic.folder(path):
        pass
    assert names(path) == {"new"}
    assert names(tmp_path) == {"adapter"}


def test_first_finished_folder_wins(tmp_path: Path):
    path = tmp_path / "adapter"

    def overtaken() -> None:
        with atomic.folder(path) as late:
            (late / "late").touch()
            with atomic.folder(path) as first:
                (first / "first").touch()

    with pytest.raises(FileExistsError):
        overtaken()
    assert names(path) == {"first"}
    assert names(tmp_path) == {"adapter"}


def test_failed_replacement_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "adapter"
    with atomic.folder(path) as new:
        (new / "old").touch()
    rename = Path.rename

    def fail_second_rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second_rename)
    with pytest.raises(OSError, match="Input/output"), atomic.folder(path, replace=True) as new:
        (new / "new").touch()
    assert names(path) == {"old"}
    assert names(tmp_path) == {"adapter"}


def test_remove_leftovers_of_dead_processes_only(tmp_path: Path):
    (tmp_path / f".tmp-a.json-{DEAD_PID}-0123abcd").touch()
    (tmp_path / f".tmp-adapter-{DEAD_PID}-0123abcd").mkdir()
    (tmp_path / f".old-done-{DEAD_PID}-0123abcd").mkdir()
    (tmp_path / "done").mkdir()
    keep = {f".tmp-b-{os.getpid()}-0123abcd", ".tmp-mine", "a.json", "done"}
    for name in keep - {"done"}:
        (tmp_path / name).touch()
    atomic.remove_leftovers(tmp_path)
    atomic.remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == keep


def test_remove_leftovers_of_one_name_only(tmp_path: Path):
    other = f".tmp-other-{DEAD_PID}-0123abcd"
    for name in (other, f".tmp-mine-{DEAD_PID}-0123abcd"):
        (tmp_path / name).mkdir()
    atomic.remove_leftovers(tmp_path, "mine")
    assert names(tmp_path) == {other}


def test_remove_leftovers_restores_a_folder_between_the_renames(tmp_path: Path):
    moved = tmp_path / f".old-step-00000050-{DEAD_PID}-0123abcd"
    moved.mkdir()
    (moved / "a").touch()
    (tmp_path / f".tmp-step-00000050-{DEAD_PID}-0123abcd").mkdir()
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == {"step-00000050"}
    assert names(tmp_path / "step-00000050") == {"a"}


WRITER = """
import sys
from pathlib import Path
from lora_cli.run import atomic
home = Path(sys.argv[1])
for number in range(10**9):
    atomic.write_text(home / "file", str(number) * 5000)
    with atomic.folder(home / "folder", replace=True) as new:
        for name in "abc":
            (new / name).write_text(str(number))
    if number == 0:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 7, 12, 20])
def test_sigkill_at_any_point_leaves_old_or_new(tmp_path: Path, milliseconds: int):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(milliseconds / 1000)
        writer.send_signal(signal.SIGKILL)
    atomic.remove_leftovers(tmp_path)
    text = (tmp_path / "file").read_text()
    assert text == text[: len(text) // 5000] * 5000
    numbers = {(tmp_path / "folder" / name).read_text() for name in "abc"}
    assert len(numbers) == 1
    assert names(tmp_path) == {"file", "folder"}
