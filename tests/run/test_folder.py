"""A run folder is one process's, and nobody's files are taken for a run's."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.folder import LOCK, open_run


def a_run(path: Path) -> Path:
    with open_run(path) as run:
        run.recipe.write_text("model: {}\n")
        run.manifest.write_text("{}\n")
        run.metrics.write_text("")
        run.checkpoints.mkdir()
        run.adapter.mkdir()
    return path


def test_makes_the_folder_and_its_parents(tmp_path: Path):
    with open_run(tmp_path / "runs" / "a") as run:
        assert run.path.is_dir()
        assert run.checkpoints == run.path / "checkpoints"


def test_an_empty_folder_and_one_given_up_before_it_began(tmp_path: Path):
    open_run(tmp_path).close()
    open_run(tmp_path).close()


def test_a_run_is_not_written_over(tmp_path: Path):
    with pytest.raises(LoraError, match="holds a run already") as refused:
        open_run(a_run(tmp_path / "a"))
    assert refused.value.hint
    assert "--resume" in refused.value.hint
    assert "--fresh" in refused.value.hint


def test_resume_keeps_everything(tmp_path: Path):
    path = a_run(tmp_path / "a")
    before = set(path.iterdir())
    open_run(path, resume=True).close()
    assert set(path.iterdir()) == before


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(LoraError, match=r"there is no run in .* to resume"):
        open_run(tmp_path / "a", resume=True)


def test_fresh_removes_the_run_and_nothing_else(tmp_path: Path):
    path = a_run(tmp_path / "a")
    (path / "notes.md").write_text("mine")
    elsewhere = tmp_path / "big-disk"
    elsewhere.mkdir()
    (elsewhere / "step").touch()
    (path / "checkpoints").rmdir()
    (path / "checkpoints").symlink_to(elsewhere)
    before = {entry.name for entry in path.iterdir()}
    with open_run(path, fresh=True) as run:
        assert {entry.name for entry in path.iterdir()} == before, "what goes wrong before the start costs no run"
        run.clear()
    assert {entry.name for entry in path.iterdir()} == {LOCK, "notes.md"}
    assert (elsewhere / "step").exists()


def test_resume_and_fresh_are_one_too_many(tmp_path: Path):
    with pytest.raises(LoraError, match="--resume and --fresh are both given"):
        open_run(tmp_path, resume=True, fresh=True)


@pytest.mark.parametrize("flags", [{}, {"fresh": True}, {"resume": True}])
def test_a_folder_of_other_files_is_left_without_a_trace(tmp_path: Path, flags: dict[str, bool]):
    (tmp_path / "recipe.yaml").write_text("mine")
    (tmp_path / "data").mkdir()
    with pytest.raises(LoraError, match=r"holds files, but no run: data, recipe.yaml"):
        open_run(tmp_path, **flags)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml", "data"}


def test_a_run_copied_without_its_hidden_files_is_still_one(tmp_path: Path):
    path = a_run(tmp_path / "a")
    (path / LOCK).unlink()
    open_run(path, resume=True).close()


def test_what_killed_processes_left_is_swept(tmp_path: Path):
    path = a_run(tmp_path / "a")
    (path / "checkpoints" / f".tmp-step-00000050-{2**22 + 1}-0123abcd").mkdir()
    open_run(path, resume=True).close()
    assert list((path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "is, or lies in, a file"),
        ("file/run", "is, or lies in, a file"),
        ("a" * 300, "File name too long"),
        ("/proc/run", "cannot be written"),
    ],
)
def test_what_can_be_no_folder(tmp_path: Path, output: str, message: str):
    (tmp_path / "file").touch()
    with pytest.raises(LoraError, match=message):
        open_run(tmp_path / output)


HOLDER = """
import sys
from lora_cli.run.folder import open_run
run = open_run(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path):
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for flags in ({}, {"fresh": True}, {"resume": True}):
            with pytest.raises(LoraError, match=f"{path} is in use by process {holder.pid}"):
                open_run(path, **flags)
        holder.kill()  # a lock ends with its process, however that ends
        holder.wait()
        open_run(path).close()
