"""The command line (typer): parse arguments, call a function of commands/, print errors in two lines. No torch."""

import sys
import time
import traceback
from typing import NoReturn

from typer._click.exceptions import NoArgsIsHelpError, UsageError

# In the order of the list in --help:
from lora_cli.cli import train, models, adapter, runs, hub, recipes, convert, cache, env  # isort: skip
from lora_cli.cli.app import JSON_ON_STDOUT, app
from lora_cli.cli.usage_errors import as_lora_error as usage_as_lora_error
from lora_cli.errors import LoraError
from lora_cli.run import console, json_output
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.print_error import print_error
from lora_cli.run.signals import handle_signals, stop_with_launcher
from lora_cli.run.standard_input import forget_stdin, receive_stdin
from lora_cli.run.streams import standard_streams
from lora_cli.run.system_errors import as_os_error
from lora_cli.run.telemetry import switch_off_telemetry
from lora_cli.run.worker import is_first_of_machine

__all__ = ["adapter", "app", "cache", "convert", "env", "hub", "main", "models", "recipes", "runs", "train"]


def main() -> None:
    """Run the command line; a LoraError prints its details, an `error:` and a `hint:` line, and sets the exit code."""
    with standard_streams(), handle_signals():
        try:
            _run()
        finally:
            json_output.release_stdout()
            console.set_verbosity()
            forget_stdin()


def _run() -> None:
    receive_stdin()  # before the thread that waits for its end
    stop_with_launcher()
    switch_off_telemetry()
    try:
        with as_os_error():
            sys.exit(app(prog_name="lora", standalone_mode=False))
    except NoArgsIsHelpError as help_page:
        sys.stdout.write(f"{help_page.message}\n")
        sys.exit(help_page.exit_code)
    except UsageError as error:
        wants_json = error.ctx is not None and JSON_ON_STDOUT in error.ctx.meta
        _report(usage_as_lora_error(error), json=wants_json)
    except LoraError as mistake:
        _report(mistake, json=json_output.is_reserved())
    except (OSError, MemoryError, RuntimeError) as error:
        if (found := as_lora_error(error)) is None:
            raise
        resume = ", and a run continues with --resume" if "train" in sys.argv[1:] else ""
        found.hint = f"{found.hint}; files written before are complete{resume}"
        _report(found, json=json_output.is_reserved())


def _report(mistake: LoraError, *, json: bool) -> NoReturn:
    """Print the lines of an error and, with --json, its document; exit with its code."""
    if not is_first_of_machine():
        # With several processes, the first one of this machine prints the error. When this one exits, the launcher
        # ends the others, so it waits.
        time.sleep(1)
        sys.exit(mistake.exit_code)
    if console.verbose and (cause := mistake.__cause__ or mistake.__context__) is not None:
        for line in "".join(traceback.format_exception(cause)).splitlines():
            console.print_always(line)
    print_error(mistake)
    if json:
        json_output.print_document(json_output.error_document(mistake))
    sys.exit(mistake.exit_code)
