"""The command line (typer): parse arguments, call a function of commands/, print errors in two lines. No torch."""

import os
import sys
import time
from typing import NoReturn

from lora_cli.cli import train, models, adapter, runs, recipes  # isort: skip  (--help lists commands in this order)
from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.run.library_warnings import silence_library_warnings
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.print_error import print_error
from lora_cli.run.signals import handle_signals, stop_with_launcher
from lora_cli.run.streams import standard_streams
from lora_cli.run.system_errors import as_os_error

__all__ = ["adapter", "app", "main", "models", "recipes", "runs", "train"]


def main() -> None:
    """Run the command line; a LoraError prints its details, an `error:` and a `hint:` line, and sets the exit code."""
    with standard_streams(), handle_signals():
        _run()


def _run() -> None:
    stop_with_launcher()
    silence_library_warnings()
    try:
        with as_os_error():
            app()
    except LoraError as mistake:
        _report(mistake)
    except (OSError, MemoryError, RuntimeError) as error:
        if (found := as_lora_error(error)) is None:
            raise
        resume = ", and a run continues with --resume" if sys.argv[1:2] == ["train"] else ""
        found.hint = f"{found.hint}; files written before are complete{resume}"
        _report(found)


def _report(mistake: LoraError) -> NoReturn:
    """Print the lines of an error, and exit with its code."""
    if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
        # With several processes, the first one of this machine prints the error. When this one exits, the launcher
        # ends the others, so it waits.
        time.sleep(1)
        sys.exit(mistake.exit_code)
    print_error(mistake)
    sys.exit(mistake.exit_code)
