"""Console output: results on stdout, messages and progress on stderr, as plain lines without a terminal.

--quiet leaves out progress and all messages but warnings; --verbose writes the seconds since the start before each one.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from lora_cli.run.quick_imports import quick_imports
from lora_cli.run.signals import at_end
from lora_cli.run.sparkline import sparkline
from lora_cli.run.worker import is_first_of_machine

# Characters that control a terminal, or turn the direction of the text: names in messages can come from any file, and
# answers from any model.
CONTROL = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}


Shown = str | Text  # what a console prints


def visible(text: str) -> str:
    """Return a text that is shown, its control characters escaped. All output for people goes through here."""
    return text.translate(CONTROL)


def styled(parts: Iterable[tuple[str, str]]) -> Shown:
    """Return a text for the console of parts with their styles; `Text` alone would drop or print control characters."""
    return Text.assemble(*((visible(text), style) for text, style in parts))


class PlainConsole(Console):
    """Prints text as it is, its control characters escaped: rich would take `rows.jsonl:100:` for an emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a printed text, or one in a table, as rich renders it."""
        return super().render_str(visible(text), **options)


# Without a `file`, rich looks up sys.stdout and sys.stderr at each line, so replacing them works (tests do).
out = PlainConsole(soft_wrap=True)
err = PlainConsole(stderr=True, soft_wrap=True)


def has_color() -> bool:
    """Return whether results are printed in colors: on a terminal that has them, if NO_COLOR does not forbid it."""
    return out.color_system is not None and not out.no_color


# With --quiet, messages that begin with one of these are still printed; errors are too.
WARNINGS = ("note:", "warning:")
STARTED = time.monotonic()

quiet = False
verbose = False


def set_verbosity(*, be_quiet: bool = False, be_verbose: bool = False, no_results: bool = False) -> None:
    """Set what is printed from now on; with `no_results`, results are not printed as text (--json prints them)."""
    global quiet, verbose
    quiet, verbose = be_quiet, be_verbose
    out.quiet = no_results


def info(line: str) -> None:
    """Print a message of one line to stderr; with --quiet, only if it is a warning."""
    _print_message(err, line)


def print_always(line: str) -> None:
    """Print a line to stderr, whatever --quiet says: one of an error."""
    err.print(line)


def _print_message(console: Console, line: str) -> None:
    if quiet and not line.startswith(WARNINGS):
        return
    seconds = f"[{time.monotonic() - STARTED:7.1f} s] " if verbose else ""
    console.print(seconds + line.replace("\n", "\\n"))  # of a name: the rest would look like another message


def print_table(table: Table) -> None:
    """Print a table to stdout; no cell is wrapped, however many columns the terminal has (80 in a pipe)."""
    if not out.quiet:
        PlainConsole(file=out.file, width=1000).print(table)


def no_output(_: str) -> None:
    """Print nothing: `info` for all processes except the first."""


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Within the block, import libraries quickly, and say so on a terminal."""
    with loading_message(), quick_imports():
        yield


@contextmanager
def loading_message() -> Iterator[None]:
    """Within the block, say on a terminal that libraries are imported, which takes seconds; the line is removed."""
    if quiet or not err.is_terminal or err.is_dumb_terminal or not is_first_of_machine():
        yield
        return
    err.file.write("loading torch, transformers and PEFT ..."[: err.width - 1])  # a second line would stay
    err.file.flush()
    try:
        yield
    finally:
        err.file.write("\r\x1b[K")
        err.file.flush()


BAR_WIDTH = 24
# Columns of the terminal: with fewer, the curve of the loss or the bar would leave no place for the figures.
CURVE_COLUMNS, BAR_COLUMNS = 100, 120


class _LineColumn(ProgressColumn):
    """Step, curve of the loss, figures and time left, as many of them as the terminal has columns for."""

    def __init__(self, *, beside: int) -> None:
        """`beside` is the number of columns that the bar takes."""
        super().__init__(table_column=Column(no_wrap=True, overflow="crop"))
        self._beside = beside
        self._left = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        """Return the line of the task."""
        total = f"{task.total or 0:.0f}"
        step, left = f"{task.completed:{len(total)}.0f}/{total}", self._left.render(task).plain
        curve = task.fields["curve"] if err.width >= CURVE_COLUMNS else ""
        # Measured for each line: the terminal can be resized.
        return Text(fit_line(step, task.fields["figures"], left, curve=curve, width=err.width - self._beside))


def fit_line(step: str, figures: Mapping[str, str], left: str, *, curve: str, width: int) -> str:
    """Return the line of a step with what fits into `width` columns.

    The curve is left out first, then the figures from the last on, and the time left; the step number stays.
    """
    names = list(figures)
    texts = [f"{name} {value}" for name, value in figures.items()]
    lines = [[step, curve, "  ".join(texts), left]]
    lines += [[step, "  ".join(texts[:count]), left] for count in range(len(texts), 0, -1)]
    lines += [[step, texts[0]], [step, figures[names[0]]]] if texts else [[step, left]]
    fitting = (line for parts in lines if len(line := " ".join(filter(None, parts))) <= width)
    return next(fitting, step)


class StepProgress:
    """Progress of training steps: a bar on a terminal, else a line every `every` steps."""

    def __init__(self, bar: Progress | None, *, total: int, done: int, every: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total, completed=done, figures={}, curve="") if bar else None
        self._losses: list[float] = []  # of each step of this process
        self._draws = err.encoding.startswith("utf")
        self._total, self._every = total, every
        self._first, self._start = done, time.monotonic()

    def step(self, number: int, values: Mapping[str, str], *, loss: float) -> None:
        """Report that step `number` is done; `values` are formatted figures by name, the bar draws the `loss`es."""
        if self._bar is not None and self._task is not None:
            self._losses.append(loss)
            curve = sparkline(self._losses) if self._draws else ""
            self._bar.update(self._task, completed=number, figures=values, curve=curve)
        elif number % self._every == 0 or number == self._total:
            left = (time.monotonic() - self._start) / max(1, number - self._first) * (self._total - number)
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            info(f"step {number}/{self._total}  {text}  left {format_duration(left)}")

    def info(self, line: str) -> None:
        """Print a message above the bar."""
        _print_message(self._bar.console if self._bar else err, line)


@contextmanager
def step_progress(total: int, *, done: int = 0, every: int = 1, bar: bool = True) -> Iterator[StepProgress]:
    """Yield the progress of `total` steps.

    Args:
        total: number of steps of the run.
        done: steps that a resumed run has done already.
        every: steps between lines without a terminal.
        bar: draw a bar on a terminal; False for all processes except the first.
    """
    if quiet or not (bar and err.is_terminal and not err.is_dumb_terminal):  # the latter cannot draw over a line
        yield StepProgress(None, total=total, done=done, every=every)
        return
    bars = [BarColumn(BAR_WIDTH)] if err.width >= BAR_COLUMNS else []
    columns = (*bars, _LineColumn(beside=(BAR_WIDTH + 1) * len(bars)))
    with at_end(_leave_bar), Progress(*columns, console=err) as progress:
        yield StepProgress(progress, total=total, done=done, every=every)


def _leave_bar() -> None:
    """Begin a new line and show the cursor again; rich, which has hidden it, may hold its lock."""
    os.write(2, b"\n\x1b[?25h")


def format_duration(seconds: float) -> str:
    """Return seconds as `1:02:03` (hours, minutes, seconds) or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(count: float) -> str:
    """Return a number of bytes as `93 KiB`, `512 MiB` or `1.5 GiB`."""
    if count < 1000:
        return f"{count:.0f} byte{'s' * (count != 1)}"
    kibibytes, mebibytes = count / 2**10, count / 2**20
    if kibibytes < 1000:
        return f"{kibibytes:.0f} KiB"
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"
