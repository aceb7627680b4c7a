"""--out is checked before a command starts: only results of this tool are replaced, and no place above other files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.checksums import verified_folder
from lora_cli.run.folder import open_run
from lora_cli.run.output_path import check_output_file, check_output_path, reserve_output_path
from tests.support.workspaces import leave_workspace


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, a run, documents, and a result of an earlier merge."""
    monkeypatch.chdir(tmp_path)
    for name in ("base/config.json", "documents/thesis.md", "runs/a/adapter/adapter_config.json", "file.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "runs/a/.lora-lock").touch()
    with verified_folder(tmp_path / "merged", kind="merged model", published=False, replace=False) as new:
        (new / "config.json").write_text("{}")
        (new / "sub").mkdir()
        (new / "sub" / "model.onnx").write_text("weights")
    return tmp_path


def check(out: str, *, replace: bool = True, kind: str = "folder") -> None:
    inputs = [Path("base"), Path("runs/a/adapter"), Path("org/hub-id")]
    check_output_path(Path(out), inputs=inputs, replace=replace, command="merge", kind=kind)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("-", "--json - is standard output, and a file is written"),
        ("no/a.json", "--json no/a.json: there is no folder no"),
        ("documents", "--json documents is a folder, and a file is written"),
        ("closed/a.json", "--json closed/a.json: closed cannot be written"),
    ],
)
def test_the_file_of_an_option_is_checked_before_the_work(
    file: str, message: str, home: Path, monkeypatch: pytest.MonkeyPatch
):
    (home / "closed").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    with pytest.raises(LoraError, match=re.escape(message)):
        check_output_file("--json", Path(file))
    check_output_file("--json", Path("documents/a.json"))
    check_output_file("--json", None)


def snapshot(home: Path) -> dict[str, str]:
    return {str(p): p.read_text() if p.is_file() else os.readlink(p) if p.is_symlink() else "" for p in home.rglob("*")}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "--out . is the working folder"),
        ("a.gguf", "--out a.gguf is the name of a file, and the merge writes a folder"),
        ("-", "--out - is standard output, and a folder is written"),
        ("..", "--out .. contains the working folder"),
        ("/", "--out / contains the working folder"),
        ("base/..", "--out base/.. is the working folder"),
        ("base", "--out base is an input of the merge"),
        ("runs", "--out runs contains runs/a/adapter, an input of the merge"),
        ("runs/a", "--out runs/a contains runs/a/adapter, an input of the merge"),
        ("runs/a/checkpoints", "--out runs/a/checkpoints is a part of the run a"),
        ("runs/a/checkpoints/step-00000001", "there is no folder runs/a/checkpoints"),
        ("documents", "--out documents is not replaced: it contains thesis.md, which lora did not write"),
        ("file.txt", "--out file.txt is a file, and the merge writes a folder"),
        ("file.txt/merged", "--out file.txt/merged cannot be written: Not a directory"),
        ("missing/merged", "--out missing/merged: there is no folder missing"),
        ("x" * 256, "cannot be written: File name too long"),
        ("a\0b", "cannot be written: its name has a NUL character"),
    ],
)
@pytest.mark.parametrize("replace", [True, False])
def test_places_that_are_refused(out: str, message: str, replace: bool, home: Path):
    before = snapshot(home)
    if not replace and "not replaced" in message:
        message = "exists"
    with pytest.raises(LoraError, match=re.escape(message)) as error:
        check(out, replace=replace)
    assert error.value.hint
    assert "\n" not in error.value.message
    assert len(error.value.message) < 250
    assert snapshot(home) == before


@pytest.mark.parametrize("target", ["merged", "missing", "file.txt", "link"])
def test_a_link_is_refused(target: str, home: Path):
    (home / "link").symlink_to(target)
    with pytest.raises(LoraError, match=f"--out link is a link to {target}"):
        check("link")


def test_a_result_of_this_tool_is_replaced_only_with_force(home: Path):
    check("merged")
    check("new")
    check("x" * 240)
    with pytest.raises(LoraError, match="--out merged exists"):
        check("merged", replace=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "notes.md").write_text("mine"), "it contains notes.md, which lora did not write"),
        (lambda folder: (folder / "sub" / "b").mkdir(), None),
        (lambda folder: (folder / "sub" / "b").symlink_to(".."), "it contains sub/b, which lora did not write"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "config.json has 3 bytes, not 2"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json has other contents"),
        (lambda folder: (folder / "config.json").unlink(), None),
    ],
    ids=["added file", "added folder", "added link", "edited", "edited, same size", "removed"],
)
def test_a_result_with_changes_of_the_user_is_not_replaced(change: object, message: str | None, home: Path):
    change(home / "merged")  # type: ignore[operator]
    if message is None:
        check("merged")
    else:
        with pytest.raises(LoraError, match=re.escape(f"--out merged is not replaced: {message}")):
            check("merged")


def test_a_folder_without_checksums_must_be_of_the_format(home: Path):
    folder = home / "downloaded"
    folder.mkdir()
    check("downloaded")  # empty
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(LoraError, match=r"it has no config\.json or adapter_config\.json"):
        check("downloaded")
    (folder / "config.json").touch()
    check("downloaded")
    (folder / "rows.json").touch()
    with pytest.raises(LoraError, match=r"it contains rows\.json, which lora did not write"):
        check("downloaded")


def test_files_are_replaced_if_they_are_of_the_format(home: Path):
    (home / "a.gguf").write_bytes(b"GGUF...")
    check("a.gguf", kind="file")
    (home / "b.gguf").write_bytes(b"notes")
    with pytest.raises(LoraError, match=r"--out b\.gguf is not replaced: it is no gguf file"):
        check("b.gguf", kind="file")
    with pytest.raises(LoraError, match="--out merged is a folder, and the merge writes a file"):
        check("merged", kind="file")
    os.mkfifo(home / "pipe.gguf")
    with pytest.raises(LoraError, match=r"--out pipe\.gguf is a device, pipe or socket"):
        check("pipe.gguf", kind="file")


def test_a_place_that_another_process_writes_to_is_refused(home: Path):
    out = Path("new")
    with reserve_output_path(out):
        with (
            pytest.raises(LoraError, match=f"--out new is being written by process {os.getpid()}"),
            reserve_output_path(out),
        ):
            pytest.fail("reserved twice")
        check("new")  # by the process itself
        with reserve_output_path(Path("other")), atomic.folder(home / "new"):
            pass
    assert {path.name for path in home.iterdir() if path.name.startswith(".tmp")} == set()
    with reserve_output_path(out):
        pass


def test_one_of_many_processes_that_start_together_reserves_the_place(home: Path):
    """Each waits until all have started, and holds the place until all have tried."""
    script = (
        "import sys; from pathlib import Path; from lora_cli.run.output_path import *\n"
        "print(flush=True); sys.stdin.readline()\n"
        "try:\n"
        "    with reserve_output_path(Path('new')): print('mine', flush=True); sys.stdin.readline()\n"
        "except LoraError: print('refused', flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(8)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = sorted(process.stdout.readline() for process in processes)
    for process in processes:
        process.communicate("\n")
    assert answers == ["mine\n", *["refused\n"] * 7]


@pytest.mark.parametrize("place", [".", "/", "missing/new", "file.txt/new", "x" * 300, "\0"])
def test_a_place_that_cannot_be_written_is_left_to_the_check(home: Path, place: str):
    with reserve_output_path(Path(place)):
        pass


def test_leftovers_are_removed_even_if_the_place_is_refused(home: Path):
    workspace = leave_workspace(home / "merged")
    with pytest.raises(LoraError, match="exists"):
        check("merged", replace=False)
    assert not workspace.exists()


def test_a_whole_run_is_never_replaced(home: Path):
    open_run("runs/b").close()
    with pytest.raises(LoraError, match=r"--out runs/b is not replaced: it contains \.lora-lock"):
        check("runs/b")
