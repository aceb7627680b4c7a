"""Print an error: its details, an `error:` and a `hint:` line on stderr. No torch."""

from lora_cli.errors import LoraError
from lora_cli.run import console


def error_lines(error: LoraError) -> list[str]:
    """Return the lines to print for `error`."""
    hint = [f"hint: {error.hint}"] if error.hint else []
    return [*error.details, f"error: {error.message}", *hint]


def print_error(error: LoraError) -> None:
    """Print the lines of `error` to stderr."""
    for line in error_lines(error):
        console.print_always(line)
