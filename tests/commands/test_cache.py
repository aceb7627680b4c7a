"""`lora cache`: what it lists, what it removes and what it leaves: never an entry that a process uses."""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lora_cli.data import cache_versions
from lora_cli.run import cache_use
from lora_cli.run.cache_entry import cached_entry, lock_entry
from lora_cli.run.console import no_output
from tests.commands.conftest import Lora, WriteRecipe
from tests.support.workspaces import leave_workspace

DAY_S = 86_400
VERSIONS = cache_versions.encoded_versions()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and an empty one of the hub; entries that a test uses are no longer in use after it."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(cache_use, "_in_use", {})
    yield tmp_path / "cache"
    release()


def release() -> None:
    """Let this process use no entry, as after its end."""
    for descriptor in cache_use._in_use.values():
        os.close(descriptor)
    cache_use._in_use.clear()


def make(
    folder: Path, name: str, *, kind: str = "encoded", what: str = "rows", days: float = 0, **versions: str
) -> Path:
    """Make an entry that was used last some days ago, and is not in use."""
    entry = cached_entry(
        folder / kind / name,
        make=lambda partial: (partial / "part-00000.arrow").write_bytes(b"x" * 3000) and None,
        what=f"the rows of {what}",
        versions={**VERSIONS, **versions},
        info=no_output,
    )
    release()
    used = time.time() - days * DAY_S
    os.utime(entry / "checksums.json", (used, used))
    return entry


def listed(lora: Lora, *options: str) -> dict[str, Any]:
    result = lora("cache", "--json", *options)
    assert result.code == 0, result.err
    value: dict[str, Any] = json.loads(result.out)
    return value


def test_an_empty_cache(folder: Path, lora: Lora):
    result = lora("cache")
    assert result.code == 0
    assert result.out.splitlines()[0] == f"{folder}: 0 entries, 0 bytes (LORA_CACHE names another folder)"
    assert "0 models and datasets of the hub, 0 bytes" in result.out


def test_entries_are_listed_with_what_they_belong_to(folder: Path, lora: Lora):
    make(folder, "a", what="train.jsonl for org/model", days=3.5)
    make(folder, "b", what="old.jsonl", format="1")
    (folder / "notes.txt").write_text("mine")
    result = lora("cache")
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["kind", "of", "size", "last", "used", "entry"]
    assert lines[1][:2] == ["rows", "old.jsonl"]
    assert lines[1][-7:] == ["today", "encoded/b", "written", "by", "an", "earlier", "version"]
    assert lines[2][:4] == ["rows", "train.jsonl", "for", "org/model"]
    assert lines[2][-4:] == ["3", "days", "ago", "encoded/a"]
    assert "notes.txt: 4 bytes, not known to this command: it is left alone" in result.out
    assert "lora cache --prune removes 1 that are no longer used" in result.err


def test_what_is_not_used_any_more_is_removed(folder: Path, lora: Lora):
    kept = make(folder, "new", days=2)
    old = make(folder, "old", days=40)
    earlier = make(folder, "earlier", transformers="1.0")
    damaged = make(folder, "damaged")
    (damaged / "part-00000.arrow").write_bytes(b"y" * 3000)
    unfinished = folder / "encoded" / ".unfinished-abc"
    unfinished.mkdir()
    (unfinished / "part-00000.arrow").write_bytes(b"z" * 100)
    workspace = leave_workspace(folder / "encoded" / "killed")
    (folder / "notes.txt").write_text("mine")
    result = lora("cache", "--prune")
    assert result.code == 0, result.err
    assert not any(os.path.lexists(path) for path in (old, earlier, damaged, unfinished, workspace))
    assert (kept / "part-00000.arrow").is_file()
    assert (folder / "notes.txt").is_file()
    assert "(not used for 40 days)" in result.out
    assert "(damaged: part-00000.arrow has other contents than when it was written)" in result.out
    assert "(written by an earlier version)" in result.out
    assert "removed 5 of 6 entries" in result.out


def test_the_number_of_days_can_be_given(folder: Path, lora: Lora):
    make(folder, "new", days=2)
    assert listed(lora, "--prune", "--older-than", "3")["removed"] == []
    value = listed(lora, "--prune", "--older-than", "1")
    assert [each["reason"] for each in value["removed"]] == ["not used for 2 days"]
    assert value["entries"] == []
    refused = lora("cache", "--older-than", "1")
    assert refused.last_two == ["error: --older-than is for --prune", "hint: add --prune, or leave it out"]


def in_another_process(code: str) -> tuple[int, int]:
    """Run `code` in a forked process until it is told to end; return its id and the descriptor that ends it."""
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end_write)
        exec(code, {"write": ready_write, "read": end_read})
        os._exit(0)
    os.close(end_read)
    assert os.read(ready_read, 1) == b"r"
    os.close(ready_read)
    os.close(ready_write)
    return pid, end_write


WAIT = "import os; os.write(write, b'r'); os.read(read, 1)"


@pytest.mark.parametrize("how", ["read", "made"])
def test_an_entry_that_a_process_uses_is_kept(how: str, folder: Path, lora: Lora):
    entry = make(folder, "used", days=90)
    (entry / "part-00000.arrow").write_bytes(b"damaged")
    use = f"from lora_cli.run.cache_use import mark_used; from pathlib import Path; mark_used(Path({str(entry)!r}))"
    if how == "made":
        use = (
            "from lora_cli.run.cache_entry import lock_entry; from pathlib import Path; "
            f"lock = lock_entry(Path({str(entry)!r}), what='x', info=print); lock.__enter__()"
        )
    pid, end = in_another_process(f"{use}\n{WAIT}")
    try:
        value = listed(lora, "--prune")
        assert (value["removed"], len(value["in_use"])) == ([], 1)
        assert "kept, because a process uses it: rows" in lora("cache", "--prune").out
    finally:
        os.close(end)
        os.waitpid(pid, 0)
    assert len(listed(lora, "--prune")["removed"]) == 1
    assert not entry.exists()


def test_an_entry_that_is_removed_while_it_is_found_is_made_again(folder: Path):
    entry = make(folder, "a")
    with cache_use.alone(entry) as nobody_else:
        assert nobody_else
        assert not cache_use.mark_used(entry)
    assert cache_use.mark_used(entry)
    with cache_use.alone(entry) as nobody_else:
        assert not nobody_else
    with lock_entry(entry, what="x", info=no_output), cache_use.alone(entry) as nobody_else:
        assert not nobody_else


@pytest.mark.parametrize("name", ["checksums.json", "about.json", "part-00000.arrow"])
def test_an_entry_that_cannot_be_read_now_is_kept(name: str, folder: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    entry, open_file = make(folder, "a", days=90), os.open

    def refuse(path: Any, *options: Any, **names: Any) -> int:
        if str(path).endswith(name) and not names.get("dir_fd"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return open_file(path, *options, **names)

    monkeypatch.setattr(os, "open", refuse)
    result = lora("cache", "--prune")
    assert "kept, because it cannot be read now: rows" in result.out
    assert "Too many open files" in result.out
    monkeypatch.setattr(os, "open", open_file)
    assert entry.is_dir()


@pytest.mark.parametrize("made_again", [False, True])
def test_an_entry_that_is_removed_while_it_is_locked_is_not_used(
    made_again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the opening of its file and the lock, `lora cache --prune` has the lock, removes it, and ends."""
    entry, lock = make(folder, "a"), fcntl.flock

    def prune_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        with cache_use.alone(entry) as nobody_else:
            assert nobody_else
            shutil.rmtree(entry)
        if made_again:
            make(folder, "a")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", prune_first)
    assert not cache_use.mark_used(entry)


@pytest.mark.slow
def test_the_rows_of_a_run_are_listed_and_its_use_is_recorded(
    folder: Path, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORA_CACHE", str(folder))
    recipe()
    assert lora("check", "recipe.yaml").code == 0
    (entry,) = listed(lora)["entries"]
    assert (entry["kind"], entry["of"], entry["problem"]) == ("rows", "the rows of rows.jsonl for base", None)
    release()
    past = time.time() - 50 * DAY_S
    os.utime(Path(entry["path"]) / "checksums.json", (past, past))
    assert lora("check", "recipe.yaml").code == 0, "the entry is used, not made again"
    (again,) = listed(lora)["entries"]
    assert again["path"] == entry["path"]
    assert again["last_used"][:10] == time.strftime("%Y-%m-%d", time.gmtime())
    assert listed(lora, "--prune", "--older-than", "0")["removed"] == [], "this process uses it"


def test_the_cache_of_the_hub_is_measured_and_left_alone(folder: Path, lora: Lora, tmp_path: Path):
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"x" * 5000)
    snapshot = blobs.parent / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    (blobs.parent / "refs").mkdir()
    (blobs.parent / "refs" / "main").write_text("0" * 40)
    value = listed(lora, "--prune", "--older-than", "0")
    assert value["hub"] == {"folder": str(tmp_path / "hub"), "repositories": 1, "bytes": 5000}
    assert (blobs / "abc").is_file()
