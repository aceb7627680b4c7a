"""The meter draws where a person watches, and for one process only."""

import io

import pytest
from rich.console import Console

from lora_cli.run import console


@pytest.mark.parametrize("bar", [True, False])
def test_a_bar_is_drawn_on_a_terminal_unless_it_is_unwanted(bar: bool, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=80))
    with console.step_progress(4, bar=bar):
        pass
    assert bool(screen.getvalue()) == bar
