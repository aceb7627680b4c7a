"""Entries of the cache: what a killed process left beside a complete one is removed by the next that uses it."""

from pathlib import Path

from lora_cli.run.cache_entry import cached_entry
from tests.support.workspaces import leave_workspace


def make(folder: Path) -> None:
    (folder / "rows").write_text("rows")


def test_leftovers_beside_a_complete_entry_are_removed(tmp_path: Path):
    told: list[str] = []
    entry = tmp_path / "0123abcd"
    assert cached_entry(entry, make=make, what="the rows", versions={}, info=told.append) == entry
    leave_workspace(entry)
    other = leave_workspace(tmp_path / "another")
    cached_entry(entry, make=make, what="the rows", versions={}, info=told.append)
    assert {path.name for path in tmp_path.iterdir()} == {entry.name, f".lock-{entry.name}", other.name}
    assert (entry / "rows").read_text() == "rows"
    assert told == []
