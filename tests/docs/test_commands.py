"""Every command of a `console` block in README.md and docs/ runs, in order, and prints what the page shows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, read_blocks, read_commands
from tests.docs.output import first_difference, matches
from tests.docs.shell import run_line

EXECUTED = [page for page in PAGES if any(block.language == "console" for block in read_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_the_commands_of_a_page_print_what_it_shows(page: str, workspace: Callable[[], Path], tmp_path: Path):
    folder, logs, variables = workspace(), tmp_path / "logs", dict[str, str]()
    logs.mkdir()
    for block in read_blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        if block.language != "console":
            continue
        for command in read_commands(block.text):
            ran = run_line(command.line, logs, variables)
            told = f"{block.place}\n$ {command.line}\nexit code {ran.code}\n{ran.output}"
            if (ran.code == 0) == ("error:" in command.output) or "Traceback" in ran.output:
                pytest.fail(told, pytrace=False)
            if command.output and not matches(command.output, ran.output):
                pytest.fail(f"{first_difference(command.output, ran.output)}\n{told}", pytrace=False)
