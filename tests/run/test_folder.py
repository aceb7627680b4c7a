"""A run folder is locked by one process, and other files in a folder are never taken for a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.folder import LOCK, open_run


def make_run(path: Path) -> Path:
    with open_run(path) as run:
        run.recipe.write_text("model: {}\n")
        run.manifest.write_text("{}\n")
        run.metrics.write_text("")
        run.checkpoints.mkdir()
        run.adapter.mkdir()
    return path


def test_creates_the_folder_and_its_parents(tmp_path: Path):
    with open_run(tmp_path / "runs" / "a") as run:
        assert run.path.is_dir()
        assert run.checkpoints == run.path / "checkpoints"


def test_empty_folder_and_folder_of_a_run_that_never_started_are_accepted(tmp_path: Path):
    open_run(tmp_path).close()
    open_run(tmp_path).close()


def test_existing_run_is_not_overwritten(tmp_path: Path):
    with pytest.raises(LoraError, match="contains a run already") as error:
        open_run(make_run(tmp_path / "a"))
    assert error.value.hint
    assert "--resume" in error.value.hint
    assert "--fresh" in error.value.hint


def test_resume_keeps_everything(tmp_path: Path):
    path = make_run(tmp_path / "a")
    before = set(path.iterdir())
    open_run(path, resume=True).close()
    assert set(path.iterdir()) == before


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(LoraError, match=r"contains no run to resume"):
        open_run(tmp_path / "a", resume=True)


def test_fresh_removes_the_run_and_nothing_else(tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / "notes.md").write_text("mine")
    elsewhere = tmp_path / "big-disk"
    elsewhere.mkdir()
    (elsewhere / "step").touch()
    (path / "checkpoints").rmdir()
    (path / "checkpoints").symlink_to(elsewhere)
    before = {entry.name for entry in path.iterdir()}
    with open_run(path, fresh=True) as run:
        assert {entry.name for entry in path.iterdir()} == before, "an error before the start must not remove a run"
        run.clear()
    assert {entry.name for entry in path.iterdir()} == {LOCK, "notes.md"}
    assert (elsewhere / "step").exists()


def test_resume_and_fresh_exclude_each_other(tmp_path: Path):
    with pytest.raises(LoraError, match="--resume and --fresh are both set"):
        open_run(tmp_path, resume=True, fresh=True)


@pytest.mark.parametrize("flags", [{}, {"fresh": True}, {"resume": True}])
def test_folder_with_other_files_stays_unchanged(tmp_path: Path, flags: dict[str, bool]):
    (tmp_path / "recipe.yaml").write_text("mine")
    (tmp_path / "data").mkdir()
    with pytest.raises(LoraError, match=r"contains files but no run: data, recipe.yaml"):
        open_run(tmp_path, **flags)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml", "data"}


def test_run_copied_without_hidden_files_can_be_resumed(tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / LOCK).unlink()
    open_run(path, resume=True).close()


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / "checkpoints" / f".tmp-step-00000050-{2**22 + 1}-0123abcd").mkdir()
    open_run(path, resume=True).close()
    assert list((path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "is a file, or inside a file"),
        ("file/run", "is a file, or inside a file"),
        ("a" * 300, "File name too long"),
        ("/proc/run", "cannot be written"),
    ],
)
def test_paths_that_cannot_be_a_folder_raise(tmp_path: Path, output: str, message: str):
    (tmp_path / "file").touch()
    with pytest.raises(LoraError, match=message):
        open_run(tmp_path / output)


HOLDER = """
import sys
from lora_cli.run.folder import open_run
run = open_run(sys.argv[1])
print("locked", flush=True)
sys.stdin.readline()
"""


def test_second_process_gets_the_pid_of_the_lock_holder(tmp_path: Path):
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        for flags in ({}, {"fresh": True}, {"resume": True}):
            with pytest.raises(LoraError, match=f"{path} is in use by process {holder.pid}"):
                open_run(path, **flags)
        holder.kill()  # the lock ends with its process, even if that is killed
        holder.wait()
        open_run(path).close()
