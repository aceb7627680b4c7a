"""Validation errors of a recipe: the location in the file, the problem, and how to fix it. No torch."""

from typing import NamedTuple


class Location(NamedTuple):
    """Where a value was written: a line of the recipe, or a `--set` option."""

    order: int  # problems are sorted by it
    text: str  # "configs/x.yaml:7" or "--set training.seed=x"


class Problem(NamedTuple):
    """An error at a location of the recipe."""

    location: Location
    key: str  # dotted, such as "data.train[0].path"; empty for an error of the entire file
    message: str  # the problem
    fix: str

    def line(self) -> str:
        """Return the problem as one printable line."""
        key = f"{shorten(self.key)}: " if self.key else ""
        return f"{self.location.text}: {key}{self.message} — {self.fix}"


class Conflict(NamedTuple):
    """Values of a recipe that cannot be combined."""

    key: str  # the dotted key at which it is reported
    message: str  # the problem
    fix: str
    depends_on: tuple[str, ...] = ()  # the other keys of the conflict, dotted


class UnreadableRecipe(Exception):
    """The recipe cannot be parsed to its end, so only this problem can be reported."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.line())
        self.problem = problem


def shorten(text: str, limit: int = 60) -> str:
    """Return `text`, cut to `limit` characters, with unprintable characters escaped."""
    short = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return short if short.isprintable() else repr(short)[1:-1]


def join_words(parts: list[str], last: str = "or") -> str:
    """Return the parts as an enumeration: `a, b or c`."""
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}" if len(parts) > 1 else "".join(parts)
