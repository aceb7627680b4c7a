"""One thing wrong with a recipe: where it is, what was found, what would fit. No torch."""

from typing import NamedTuple


class Location(NamedTuple):
    """Where a value was written: a line of the recipe, or a `--set` of the command line."""

    order: int  # problems are shown in this order
    text: str  # "configs/x.yaml:7" or "--set training.seed=x"


class Problem(NamedTuple):
    """A finding that its writer can mend."""

    place: Location
    key: str  # dotted, as in "data.train[0].path"; empty where the whole file is meant
    found: str
    fix: str

    def line(self) -> str:
        key = f"{shorten(self.key)}: " if self.key else ""
        return f"{self.place.text}: {key}{self.found} — {self.fix}"


class UnreadableRecipe(Exception):
    """The text could not be read to its end, so this is the one problem that can be told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.line())
        self.problem = problem


def shorten(text: str, limit: int = 60) -> str:
    """Text as it was written, cut to `limit` characters, and escaped where it would break the line."""
    short = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return short if short.isprintable() else repr(short)[1:-1]


def join_words(parts: list[str], last: str = "or") -> str:
    """`a, b or c`."""
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}" if len(parts) > 1 else "".join(parts)
