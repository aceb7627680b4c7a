"""The progress bar is drawn on a terminal, and by one process only."""

import io

import pytest
from rich.console import Console

from lora_cli.run import console


@pytest.mark.parametrize("bar", [True, False])
def test_bar_is_drawn_on_a_terminal_unless_disabled(bar: bool, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=80))
    with console.step_progress(4, bar=bar):
        pass
    assert bool(screen.getvalue()) == bar
