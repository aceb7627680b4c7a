"""What a person sees: results on stdout, progress and messages on stderr; plain lines where that is no terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Without a file given, rich asks for sys.stdout and sys.stderr at each line: whoever replaces them is heard.
out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def info(line: str) -> None:
    """A message for whoever watches the run."""
    err.print(line)


def no_output(_: str) -> None:
    """`say` of the processes that are not the first."""


class StepProgress:
    """Shows steps as they happen: a bar on a terminal, else a line every `every` steps."""

    def __init__(self, bar: Progress | None, *, total: int, done: int, every: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total, completed=done, line="") if bar else None
        self._total, self._every = total, every
        self._first, self._began = done, time.monotonic()

    def step(self, number: int, values: Mapping[str, str]) -> None:
        """Step `number` is done; `values` are named figures, ready to print."""
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, line=text)
        elif number % self._every == 0 or number == self._total:
            left = (time.monotonic() - self._began) / max(1, number - self._first) * (self._total - number)
            err.print(f"step {number}/{self._total}  {text}  left {format_duration(left)}")

    def info(self, line: str) -> None:
        """A message above the bar."""
        (self._bar.console if self._bar else err).print(line)


@contextmanager
def step_progress(total: int, *, done: int = 0, every: int = 1, bar: bool = True) -> Iterator[StepProgress]:
    """A meter for `total` steps of which `done` are done; without `bar` it draws none on a terminal either."""
    if not (bar and err.is_terminal):
        yield StepProgress(None, total=total, done=done, every=every)
        return
    columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        yield StepProgress(progress, total=total, done=done, every=every)


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(count: float) -> str:
    """Bytes for a reader: `512 MiB`, `1.5 GiB`."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"
