"""The exception for user errors (recipe, data, model, arguments), and the line that quotes a library's. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_LINE = 2000  # characters of a message
MAX_QUOTED = 300  # characters of a library's error message in it


class LoraError(Exception):
    """An error that the user can fix; printed as one `error:` and one `hint:` line without a traceback.

    Attributes:
        message: the problem, in one line.
        hint: how to fix it, in one line; None if the message is enough.
        details: further one-line messages, printed before the error, such as all problems of a recipe.
        exit_code: 2 for a bad recipe, data, model or argument; 1 for a run that failed.
        record: what the document of --json has besides the error.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        details: Sequence[str] = (),
        exit_code: int = 2,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        # Names of files, columns and tokens are parts of messages; those of damaged files can contain anything.
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        self.details = tuple(map(one_line, details))
        self.exit_code = exit_code
        self.record = dict(record or {})


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message for one of ours: printable, and not too long.

    Damaged files put control characters and whole contents into such messages.
    """
    return one_line(next(iter(str(error).splitlines()), "").strip() or type(error).__name__, limit=MAX_QUOTED)


def one_line(text: str, *, limit: int = MAX_LINE) -> str:
    """Return `text` with its unprintable characters escaped, as line breaks and those that control a terminal; cut."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
