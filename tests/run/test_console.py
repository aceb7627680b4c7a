"""The progress bar is drawn on a terminal, and by one process only; tables are not wrapped."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import lora_cli
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


def test_text_is_printed_as_it_is_and_controls_no_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(console, name, console.PlainConsole(file=screen, soft_wrap=True))
    table = Table("a:x:", box=None)
    table.add_row("rows.jsonl:100: \x1b[2J")
    console.info("rows.jsonl:100: [bold]no[/bold]")
    console.out.print("runs/a:smile:\x1b[2J\u202e ünï\n")
    console.print_table(table)
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert lines == [
        "rows.jsonl:100: [bold]no[/bold]", r"runs/a:smile:\x1b[2J\u202e ünï", "", " a:x:", r" rows.jsonl:100: \x1b[2J"
    ]  # fmt: skip


def test_a_styled_text_shows_its_control_characters():
    """rich's Text would drop the bell and the carriage return, and print the escape."""
    screen = io.StringIO()
    text = console.styled([("a\x07\r", ""), ("\x1b[2J\x9b\u200f [red]b[/red]", "bold")])
    console.PlainConsole(file=screen, soft_wrap=True).print(text)
    assert screen.getvalue() == "a\\x07\\r\\x1b[2J\\x9b\\u200f [red]b[/red]\n"


def test_a_message_is_one_line(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", console.PlainConsole(file=screen, soft_wrap=True))
    console.info("runs/a\nerror: no.jsonl: read")
    assert screen.getvalue() == "runs/a\\nerror: no.jsonl: read\n"


# Files that write to a standard stream themselves, and what.
WRITERS = {
    "__main__.py": "a line of its own",
    "cli/__init__.py": "the help page",
    "cli/recipes.py": "the JSON Schema",
    "commands/chat.py": "answers: at a terminal, by console.visible; else as they are",
    "commands/convert.py": "a recipe: YAML has no control characters",
    "commands/env.py": "JSON for its parent process",
    "export/gguf/llama_cpp_server.py": "an address for its parent process",
    "run/json_output.py": "JSON, its control characters escaped",
}


def test_all_other_output_goes_through_the_console():
    package = Path(lora_cli.__file__).parent
    texts = {file.relative_to(package).as_posix(): file.read_text() for file in package.rglob("*.py")}
    writes = re.compile(r"(?<![\w.])print\(|sys\.std(out|err)\.write\(")
    assert {name for name, text in texts.items() if writes.search(text)} == WRITERS.keys()
    of_rich = re.compile(r"^\s*(from rich import|from rich\.(text|markup|panel)|import rich)", re.MULTILINE)
    assert [name for name, text in texts.items() if of_rich.search(text)] == ["run/console.py"], "use console.styled"


def drawn_progress(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what the progress of steps 1200 to 1240 of 4000 draws on a terminal of `width` columns."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=width))
    figures = {"loss": "6.7657", "lr": "6.82e-06", "grad": "2.45", "tok/s": "12100", "mem": "69.2 GiB"}
    with console.step_progress(4000) as progress:
        for step in range(1200, 1241):
            progress.step(step, figures, loss=float(step))
    return screen.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_figure_is_cut_off(width: int, monkeypatch: pytest.MonkeyPatch):
    screen = drawn_progress(width, monkeypatch)
    last = screen.rpartition("\r")[2]
    assert "1240/4000" in last
    assert "mem 69.2 GiB" in last
    assert "…" not in last


@pytest.mark.parametrize(
    ("width", "kept", "left_out"),
    [
        (79, ("tok/s 12100", "0:"), ("mem",)),
        (60, ("loss 6.7657", "lr 6.82e-06", "0:"), ("tok/s",)),
        (40, ("loss 6.7657", "0:"), ("lr",)),
        (20, ("6.7657",), ("loss", "0:")),
        (10, (), ("6.7657",)),
    ],
)
def test_a_narrow_terminal_keeps_step_loss_and_time_left(
    width: int, kept: tuple[str, ...], left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    screen = drawn_progress(width, monkeypatch)
    last = screen.rpartition("\x1b[2K")[2].partition("\n")[0]
    assert last.startswith("1240/4000")
    assert len(last) <= width
    assert all(text in last for text in kept), last
    assert not any(text in last for text in left_out), last


def test_the_line_of_a_long_run_is_cut_nowhere():
    figures = {"loss": "6.7657", "lr": "6.82e-06"}
    for width in range(9, 100):
        line = console.fit_line("1240/4000", figures, "0:00:12", curve="", width=width)
        assert len(line) <= width
        assert line.startswith("1240/4000")
        assert all(word in ("1240/4000", "0:00:12", *figures, *figures.values()) for word in line.split())


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
    for width in (80, 20):
        _check_told(
            terminal, rank, text if width == 80 else text.replace("sformers and PEFT ...", ""), width, monkeypatch
        )


def _check_told(terminal: bool, rank: str, text: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=file, force_terminal=terminal, width=width))
    with console.loading_libraries():
        pass
    assert file.getvalue() == text
