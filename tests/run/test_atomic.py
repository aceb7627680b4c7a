"""Atomic writes: a reader finds the complete old or new result, even if the writer was killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from lora_cli.run import atomic, rename, workspace
from lora_cli.run.workspace import REMOVED, remove_leftovers, reserve
from tests.support.workspaces import leave_workspace


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


@pytest.fixture(params=["exchange", "two renames"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel's exchange of two paths, and file systems that lack it."""
    if request.param == "two renames":
        monkeypatch.setattr(rename, "_rename", lambda source, target, flag: False)
    return str(request.param)


@pytest.mark.usefixtures("renames")
def test_a_folder_is_replaced(tmp_path: Path):
    for text in ("old", "new"):
        with atomic.folder(tmp_path / "adapter", replace=True) as new:
            (new / text).touch()
    assert names(tmp_path / "adapter") == {"new"}
    assert names(tmp_path) == {"adapter"}


def test_failed_replacement_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "adapter"
    with atomic.folder(path) as new:
        (new / "old").touch()
    original = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(rename, "_rename", lambda source, target, flag: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), atomic.folder(path, replace=True) as new:
        (new / "new").touch()
    assert names(path) == {"old"}
    assert names(tmp_path) == {"adapter"}


def test_leftovers_of_ended_processes_are_removed_and_no_others(tmp_path: Path):
    dead = leave_workspace(tmp_path / "a")
    (dead / "a").write_text("half")
    (tmp_path / ".tmp-empty-01234567").mkdir()  # killed between mkdir and the lock
    (tmp_path / ".tmp-of-another-program-01234567").mkdir()
    (tmp_path / ".tmp-of-another-program-01234567" / "x").touch()
    (tmp_path / ".tmp-link-01234567").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    keep = {".tmp-of-another-program-01234567", ".tmp-link-01234567", "elsewhere"}
    with atomic.temporary_folder(tmp_path / "b") as alive:
        remove_leftovers(tmp_path)
        assert names(tmp_path) == keep | {alive.parent.name}
        with pytest.raises(BlockingIOError, match=str(os.getpid())), reserve(tmp_path / "b"):
            pass
        with reserve(tmp_path / "a"):
            pass
    remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == keep
    assert names(tmp_path / "elsewhere") == {"lock"}


def test_the_next_writer_removes_leftovers_of_its_name(tmp_path: Path):
    for name in ("a", "b"):
        (leave_workspace(tmp_path / name) / name).write_text("half")
    atomic.write_text(tmp_path / "a", "text")
    with atomic.folder(tmp_path / "b"):
        pass
    leave_workspace(tmp_path / "a")
    with pytest.raises(FileExistsError), atomic.file(tmp_path / "a"):
        pass
    assert names(tmp_path) == {"a", "b"}


def test_leftovers_of_one_name_only(tmp_path: Path):
    other = leave_workspace(tmp_path / "other")
    leave_workspace(tmp_path / "mine")
    remove_leftovers(tmp_path, "mine")
    assert names(tmp_path) == {other.name}


def test_a_name_of_any_allowed_length_can_be_written(tmp_path: Path):
    for name in ("x" * 255, "ü" * 127):
        atomic.write_text(tmp_path / name, "text")
        leave_workspace(tmp_path / name)
        remove_leftovers(tmp_path, name)
    assert names(tmp_path) == {"x" * 255, "ü" * 127}


def test_a_removal_is_complete_or_not_begun(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic.remove(tmp_path / "link")
    assert names(tmp_path) == {"target"}
    workspace = leave_workspace(tmp_path / "target")
    (tmp_path / "target").rename(workspace / REMOVED)  # killed here
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_files_that_belong_together_are_replaced_together(tmp_path: Path):
    paths = [tmp_path / "out.gguf", tmp_path / "out.export.json"]
    for text in ("old", "new"):
        with atomic.files(paths, replace=True) as temporary:
            for path in temporary:
                path.write_text(text)
    assert [path.read_text() for path in paths] == ["new", "new"]
    with pytest.raises(FileExistsError), atomic.files(paths):
        pass
    assert names(tmp_path) == {"out.gguf", "out.export.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("replace", [True, False])
def test_a_kill_at_any_operation_leaves_old_or_new(replace: bool, renames: str, tmp_path: Path):
    """Stop a writer before each of its file operations in turn, as SIGKILL would; then clean up."""
    seen = set()
    for number in count():
        home = tmp_path / str(number)
        home.mkdir()
        if replace:
            write_results(home, "old")
        done = run_until(home, number)
        before = (home / "out").exists(), (home / "out.json").exists()
        assert not (before[0] and before[1]) or (home / "out").read_text() == (home / "out.json").read_text()
        remove_leftovers(home)
        assert not [name for name in names(home) if name.startswith(".")]
        found = {path.name: (path / "a" if path.is_dir() else path).read_text() for path in home.iterdir()}
        assert found.get("out") == found.get("out.json")
        assert set(found.values()) <= {"old", "new"}
        assert len(found) == 4 or not replace
        seen.add(tuple(sorted(found.values())))
        if done:
            break
    assert number > 20
    assert ("new",) * 4 in seen


def write_results(home: Path, text: str) -> None:
    atomic.write_text(home / "file", text)
    with atomic.folder(home / "folder", replace=True) as new:
        (new / "a").write_text(text)
    with atomic.files([home / "out", home / "out.json"], replace=True) as (out, description):
        out.write_text(text)
        description.write_text(text)


def run_until(home: Path, number: int) -> bool:
    """Write results in a forked process that ends before its file operation `number`; return whether it finished."""
    child = os.fork()
    if child == 0:
        left = [number]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in OPERATIONS:
                if not left[0]:
                    os._exit(9)
                left[0] -= 1

        real = os.fsync
        os.fsync = lambda descriptor: (hook("fsync", ()), real(descriptor))[1]  # has no event
        sys.addaudithook(hook)
        write_results(home, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Events of the interpreter before file operations; `ctypes.dlopen` comes before the exchange of two paths.
OPERATIONS = {"fsync", "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "ctypes.dlopen"}


WRITER = """
import sys
from pathlib import Path
from lora_cli.run import atomic, rename
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
    remove_leftovers(tmp_path)
    text = (tmp_path / "file").read_text()
    assert text == text[: len(text) // 5000] * 5000
    numbers = {(tmp_path / "folder" / name).read_text() for name in "abc"}
    assert len(numbers) == 1
    assert names(tmp_path) == {"file", "folder"}


def fail_once(monkeypatch: pytest.MonkeyPatch, target: object, name: str, *, at: int, code: int = errno.EIO) -> None:
    """Let the call number `at` (from 1) of a function fail with an error of the operating system."""
    own, calls = getattr(target, name), count(1)

    def call(*args: object, **options: object) -> object:
        if next(calls) == at:
            raise OSError(code, os.strerror(code))
        return own(*args, **options)

    monkeypatch.setattr(target, name, call)


def test_a_folder_that_cannot_be_listed_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write() -> None:
        with atomic.folder(tmp_path / "out") as partial:
            (partial / "a").write_text("a")
            fail_once(monkeypatch, os, "scandir", at=1)

    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert not (tmp_path / "out").exists()


def test_new_files_that_belong_together_appear_all_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write() -> None:
        with atomic.files([tmp_path / "a.gguf", tmp_path / "export.json"]) as new:
            for path in new:
                path.write_text("new")

    fail_once(monkeypatch, workspace, "rename_without_replacing", at=2)
    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert names(tmp_path) == set()


def test_a_file_of_an_unpublished_folder_is_written_in_place(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("a longer part of an earlier one")
    atomic.write_json_unpublished(path, {"ü": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json_unpublished(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="link"):
        atomic.write_json_unpublished(tmp_path / "link", 2)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    assert names(tmp_path) == {"a.json", "link"}
