"""The exception for user errors (recipe, data, model, arguments): message, hint, exit code. No torch."""

from collections.abc import Sequence


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
