"""A run folder is locked by one process, and other files in a folder are never taken for a run."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.folder import MOVING, check_start, open_run
from lora_cli.run.run_lock import LOCK
from lora_cli.run.run_results import PAGE_MARK
from tests.support.workspaces import leave_workspace


def make_run(path: Path) -> Path:
    with open_run(path) as run:
        run.recipe.write_text("model: {}\n")
        run.manifest.write_text('{"versions": {"lora-cli": "0.1.0"}}\n')
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


def test_fresh_moves_the_run_aside_and_nothing_else(tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / "notes.md").write_text("mine")
    (path / "logs").mkdir()
    elsewhere = tmp_path / "big-disk"
    elsewhere.mkdir()
    (elsewhere / "step").touch()
    (path / "checkpoints").rmdir()
    (path / "checkpoints").symlink_to(elsewhere)
    before = {entry.name for entry in path.iterdir()}
    with open_run(path, fresh=True) as run:
        assert {entry.name for entry in path.iterdir()} == before, "an error before the start must not change a run"
        assert run.move_earlier_aside() == path / "earlier-1"
        assert run.move_earlier_aside() is None
    assert {entry.name for entry in path.iterdir()} == {LOCK, "notes.md", "logs", "earlier-1"}
    moved = {entry.name for entry in (path / "earlier-1").iterdir()}
    assert moved == before - {LOCK, "notes.md", "logs"}
    assert (path / "earlier-1" / "checkpoints" / "step").exists()


def test_fresh_moves_what_was_written_about_the_run(tmp_path: Path):
    path = make_run(tmp_path / "a")
    measured = {"rows": 2, "data": "0", "results": {"base": {}}}
    answer = {"where": "rows.jsonl:1", "prompt": "a", "references": [], "answers": {}}
    about = {
        "report.html": f"{PAGE_MARK}<html>",
        "eval.json": json.dumps(measured),
        "answers-of-7.jsonl": json.dumps(answer),
    }
    about |= {"metrics.damaged-1.jsonl": "{", "manifest.damaged-2.json": "{"}
    own = {
        "my-page.html": "<!doctype html>",
        "labels.json": '{"results": 1}',
        "rows.jsonl": '{"prompt": "a"}\n',
        "b.json": "[",
    }
    own |= {"notes.damaged-1.md": "", "empty.jsonl": ""}
    for name, text in (about | own).items():
        (path / name).write_text(text)
    os.mkfifo(path / "pipe.html")
    (path / "link.jsonl").symlink_to("nothing")
    (path / "folder.json").mkdir()
    with open_run(path, fresh=True) as run:
        run.move_earlier_aside()
    assert {entry.name for entry in path.iterdir()} == {
        LOCK,
        "earlier-1",
        "pipe.html",
        "folder.json",
        "link.jsonl",
        *own,
    }
    assert {entry.name for entry in (path / "earlier-1").iterdir()} >= about.keys()


def test_a_move_that_was_killed_takes_a_page_too(tmp_path: Path):
    path = moving_run(tmp_path / "a")
    (path / "report.html").write_text(PAGE_MARK)
    open_run(path).close()
    assert {entry.name for entry in path.iterdir()} == {LOCK, "earlier-1"}


@pytest.mark.parametrize("options", [{"fresh": True}, {"resume": True}, {}])
def test_a_killed_move_is_completed_by_the_next_command(options: dict[str, bool], tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / "earlier-1").mkdir()
    (path / "earlier-1" / "recipe.yaml").touch()
    (path / "earlier-2").mkdir()
    (path / "earlier-2" / MOVING).touch()
    (path / "adapter").rename(path / "earlier-2" / "adapter")  # killed here
    if "resume" in options:
        with pytest.raises(LoraError, match="contains no run to resume"):
            open_run(path, **options)
    else:
        with open_run(path, **options) as run:
            assert run.move_earlier_aside() is None
    assert {entry.name for entry in path.iterdir()} == {LOCK, "earlier-1", "earlier-2"}
    moved = {entry.name for entry in (path / "earlier-2").iterdir()}
    assert moved == {"adapter", "checkpoints", "recipe.yaml", "manifest.json", "metrics.jsonl"}


def test_a_folder_that_a_kill_left_before_anything_was_moved_is_used(tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / "earlier-1").mkdir()
    with open_run(path, fresh=True) as run:
        assert run.move_earlier_aside() == path / "earlier-1"
    assert not (path / "earlier-1" / MOVING).exists()


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "metrics.jsonl", "recipe.yaml"])
def test_a_link_in_place_of_a_file_of_a_run_is_refused(name: str, tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / name).rename(tmp_path / "target")
    (path / name).symlink_to(tmp_path / "target")
    with pytest.raises(LoraError, match=f"{name} is a link to "):
        open_run(path, resume=True)
    (path / name).unlink()
    (path / name).symlink_to(tmp_path / "missing")
    with pytest.raises(LoraError, match=f"{name} is a link to "):
        open_run(path, resume=True)


def test_a_run_folder_that_is_a_link_is_accepted(tmp_path: Path):
    make_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    open_run(tmp_path / "link", resume=True).close()


def test_nothing_is_written_through_a_link_in_place_of_the_lock(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a").mkdir()
    for make in (lambda lock: lock.symlink_to(tmp_path / "precious"), Path.mkdir, os.mkfifo):
        lock = tmp_path / "a" / LOCK
        make(lock)
        with pytest.raises(LoraError, match=r"\.lora-lock is not a file of lora"):
            open_run(tmp_path / "a")
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_recipe_and_a_manifest_of_the_user_are_no_run(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("mine")
    (tmp_path / "manifest.json").write_text('{"versions": {"app": "1"}}')
    (tmp_path / "logs").mkdir()
    for flags in ({}, {"fresh": True}, {"resume": True}):
        with pytest.raises(LoraError, match="contains files but no run"):
            open_run(tmp_path, **flags)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml", "manifest.json", "logs"}


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
    leave_workspace(path / "checkpoints" / "step-00000050")
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
from lora_cli.run import atomic
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


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_a_file_in_place_of_a_folder_of_the_run_is_named(name: str, tmp_path: Path):
    path = make_run(tmp_path / "a")
    (path / name).rmdir()
    (path / name).touch()
    with pytest.raises(LoraError, match=f"{path / name} is a file, not a folder"):
        open_run(path, resume=True)
    open_run(path, fresh=True).close()


def moving_run(path: Path) -> Path:
    (make_run(path) / "earlier-1").mkdir()
    (path / "earlier-1" / MOVING).touch()
    return path


def folder_of_a_user(path: Path) -> Path:
    path.mkdir()
    (path / "recipe.yaml").write_text("mine")
    return path


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("make", [Path, make_run, moving_run, folder_of_a_user, lambda path: path.with_name("a" * 300)])
def test_what_is_checked_before_the_imports_is_what_opening_says(
    make: Callable[[Path], Path], flags: tuple[bool, bool], tmp_path: Path
):
    resume, fresh = flags
    path = make(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    early = late = ""
    try:
        check_start(path, resume=resume, fresh=fresh)
    except LoraError as error:
        early = error.message
    assert sorted(tmp_path.rglob("*")) == before
    try:
        open_run(path, resume=resume, fresh=fresh).close()
    except LoraError as error:
        late = error.message
    assert early in ("", late)
    if make is make_run:
        assert early == late


def test_the_user_of_a_run_is_told_by_opening_it(tmp_path: Path):
    with open_run(make_run(tmp_path / "a"), resume=True):
        check_start(tmp_path / "a", resume=False, fresh=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (ValueError("Error while serializing: I/O error: disk (os error 28)"), "No space left on device"),  # of Rust
        (MemoryError(), "this machine has too little memory"),
        (ValueError("a bug"), "ValueError('a bug')"),
    ],
)
def test_the_error_that_ends_a_run_is_recorded_as_the_terminal_gets_it(tmp_path: Path, error: Exception, message: str):
    def train() -> None:
        with open_run(tmp_path) as run:
            run.begin()
            raise error

    with pytest.raises(type(error)):
        train()
    assert json.loads((tmp_path / "failed.json").read_text())["error"] == message
