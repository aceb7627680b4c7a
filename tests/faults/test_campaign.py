"""The frame of the fault campaigns, and a small part of each campaign with a fixed seed."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, Outcome, Result, prepare, run_campaign
from tests.faults.campaigns import campaigns
from tests.faults.operations import Action, call_before_operations, fail_at, kill_after, kill_at, record_in
from tests.faults.table import MARKS, Row, table_rows, write_table

ROOT = Path(__file__).parents[2]


def write_inputs(folder: Path) -> None:
    (folder / "input").write_text("input")


def numbers(seed: int, folder: Path) -> Iterator[int]:
    assert (folder / "input").is_file()
    return count(seed)


def try_number(number: int, folder: Path) -> Outcome:
    if number == 101:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 102:
        (folder / "input").unlink()
        time.sleep(1000)
    if number == 103:
        raise ValueError("of the campaign")
    if not (folder / "input").is_file():
        return Outcome("lost", "", "the folder is not as it was")
    return Outcome("survived", str(number))


def run_numbers(scratch: Path, **options: int | None) -> dict[int, str]:
    campaign = Campaign("numbers", "numbers", write_inputs, numbers, try_number, seconds=0.5)
    prepare(campaign, scratch / "numbers")
    chosen = {"count": 6, "only": None, **options}
    results = run_campaign(campaign, scratch / "numbers", seed=100, workers=2, until=None, **chosen)
    return {result.number: f"{result.outcome.verdict} {result.outcome.fault}" for result in results}


def test_cases_that_crash_or_hang_end_only_themselves(tmp_path: Path):
    assert run_numbers(tmp_path) == {
        0: "survived 100",
        1: "traceback the process of the case ended",
        2: "hang ",
        3: "traceback the campaign itself",
        4: "survived 104",
        5: "survived 105",
    }


def test_one_case_is_tried_again_by_its_number(tmp_path: Path):
    assert run_numbers(tmp_path, only=5) == {5: "survived 105"}


def write_files(home: Path, action: Action) -> int:
    """Write two files in a forked process, with `action` before each operation; return its exit code."""
    child = os.fork()
    if child == 0:
        os.chdir(home)
        call_before_operations(home, action)
        try:
            Path("folder").mkdir()
            (home / "folder" / "first").write_text("x" * 100)
            os.rename("folder/first", "folder/second")
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fault_comes_before_the_operation_of_its_number(tmp_path: Path):
    homes = [tmp_path / str(number) for number in range(5)]
    for home in homes:
        home.mkdir()
    assert write_files(homes[0], record_in(tmp_path / "operations")) == 0
    assert (tmp_path / "operations").read_text().splitlines() == [
        "1 os.mkdir folder",
        "1 open for writing folder/first",
        "1 os.rename folder/first",
    ]
    assert write_files(homes[1], kill_at(1)) == -signal.SIGKILL
    assert list((homes[1] / "folder").iterdir()) == []
    assert write_files(homes[2], kill_at(2)) == -signal.SIGKILL
    assert (homes[2] / "folder" / "first").read_text() == "x" * 100
    assert write_files(homes[3], kill_after(0, 60)) == -signal.SIGXFSZ
    assert (homes[3] / "folder" / "first").read_text() == "x" * 60
    assert write_files(homes[4], fail_at(2, errno.EIO, lasting=False)) == errno.EIO
    assert (homes[4] / "folder" / "first").exists()


@pytest.mark.slow
def test_a_part_of_each_campaign(tmp_path: Path):
    table = tmp_path / "faults.md"
    command = [sys.executable, "-m", "tests.faults.run_campaigns", "--quick", "--cases", "1", "--seed", "1"]
    result = subprocess.run(
        [*command, "--workers", "2", "--markdown", str(table)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = table.read_text(encoding="utf-8")
    assert "\n| files vanish | 1 | 1 | 0 | 0 | 0 | 0 |" in written


def test_the_page_has_a_row_for_each_campaign_between_the_marks():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    table = page.split(MARKS[0])[1].split(MARKS[1])[0]
    titles = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert titles == ["kind", *(campaign.title for campaign in campaigns(quick=False).values()), "**all**"]


def test_rows_of_other_campaigns_stay_in_the_table(tmp_path: Path):
    file = tmp_path / "faults.md"
    file.write_text(f"before\n{MARKS[0]}\n{MARKS[1]}\nafter\n", encoding="utf-8")
    row = Row("vanish", "files vanish", [Result(0, Outcome("survived", "")), Result(1, Outcome("not tried", ""))])
    write_table(file, table_rows([row], seed=7))
    write_table(file, table_rows([Row("kill", "killed before a file operation", [Result(0, Outcome("lost", ""))])], 8))
    write_table(file, table_rows([row._replace(results=row.results[:1] * 1200)], seed=9))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert lines[4:7] == [
        f"| killed before a file operation | 1 | 0 | 1 | 0 | 0 | 0 | {today} | 8 |",
        f"| files vanish | 1,200 | 1,200 | 0 | 0 | 0 | 0 | {today} | 9 |",
        "| **all** | **1,201** | **1,200** | **1** | **0** | **0** | **0** | | |",
    ]
