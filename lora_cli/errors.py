"""The one error a user's mistake becomes: what was found, what would fit, what to do. No torch."""

from collections.abc import Sequence


class LoraError(Exception):
    """A mistake the user can mend; shown as one `error:` and one `hint:` line, never a traceback.

    Attributes:
        message: what was found, in one line.
        hint: what would fit and what to do, in one line, or None where the message says it all.
        details: further one-line findings, printed before the error (all problems of a recipe, say).
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
