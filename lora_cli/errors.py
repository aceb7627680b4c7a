"""The exception for user errors (recipe, data, model, arguments), and the line that quotes a library's. No torch."""

from collections.abc import Sequence

MAX_QUOTED = 300  # characters of a library's error message


class LoraError(Exception):
    """An error that the user can fix; printed as one `error:` and one `hint:` line without a traceback.

    Attributes:
        message: the problem, in one line.
        hint: how to fix it, in one line; None if the message is enough.
        details: further one-line messages, printed before the error, such as all problems of a recipe.
        exit_code: 2 for a bad recipe, data, model or argument; 1 for a run that failed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        details: Sequence[str] = (),
        exit_code: int = 2,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message for one of ours: printable, and not too long.

    Damaged files put control characters and whole contents into such messages.
    """
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= MAX_QUOTED else printable[: MAX_QUOTED - 3] + "..."
