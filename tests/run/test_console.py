"""The progress bar is drawn on a terminal, and by one process only; tables are not wrapped."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from lora_cli.run import console


@pytest.mark.parametrize("bar", [True, False])
def test_bar_is_drawn_on_a_terminal_unless_disabled(bar: bool, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=80))
    with console.step_progress(4, bar=bar):
        pass
    assert bool(screen.getvalue()) == bar


@pytest.mark.parametrize(("encoding", "width"), [("utf-8", 120), ("utf-8", 80), ("ascii", 120)])
def test_the_bar_has_the_curve_of_the_loss(encoding: str, width: int, monkeypatch: pytest.MonkeyPatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=width))
    with console.step_progress(4) as progress:
        for number, loss in enumerate((3.0, 2.0, 1.0), start=1):
            progress.step(number, {"loss": f"{loss:.4f}"}, loss=loss)
    screen.flush()
    drawn = screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "loss 1.0000" in drawn
    assert ("█▅▁" in drawn) == (encoding == "utf-8" and width == 120)


def test_the_cells_of_a_wide_table_are_not_wrapped(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, width=80, soft_wrap=True))
    table = Table("", *(["two words"] * 12), box=None)
    table.add_row("experts.gate_up_proj", *(["layer 1"] * 12))
    console.print_table(table)
    head, row = (line.split("  ") for line in screen.getvalue().splitlines())
    assert [cell.strip() for cell in head if cell] == ["two words"] * 12
    assert [cell.strip() for cell in row if cell.strip()] == ["experts.gate_up_proj"] + ["layer 1"] * 12


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1023, "1 KiB"), (95_000, "93 KiB"), (1 << 20, "1 MiB"),
     (1023 << 20, "1.0 GiB"), (1536 << 20, "1.5 GiB")],
)  # fmt: skip
def test_bytes_are_formatted_with_two_or_three_digits(count: int, text: str):
    assert console.format_bytes(count) == text


@pytest.mark.parametrize(
    ("terminal", "rank", "text"),
    [
        (True, "0", "loading torch, transformers and PEFT ...\r\x1b[K"),
        (True, "1", ""),
        (False, "0", ""),
    ],
)
def test_a_terminal_is_told_that_libraries_are_loaded(
    terminal: bool, rank: str, text: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=file, force_terminal=terminal))
    with console.loading_libraries():
        pass
    assert file.getvalue() == text
