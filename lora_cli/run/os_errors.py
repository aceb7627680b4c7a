"""Turn an error of the operating system that the user can mend into a LoraError: message, hint, exit code. No torch."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.folder import LOCK, user_of_run
from lora_cli.run.system_errors import HINTS, VANISHED, describe


def as_lora_error(error: OSError) -> LoraError | None:
    """Return the error to show for `error`; None if it is a bug, which keeps its traceback."""
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # safetensors gives no number
    if number not in HINTS:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    hint = HINTS[number]
    if hint == VANISHED and path and (user := _user(Path(path))) is not None:
        hint = f"process {user} is training in this run: wait for it, or copy the adapter first"
    return LoraError(describe(error), hint=hint, exit_code=1)


def _user(path: Path) -> str | None:
    """Return the id of the process that has locked the run which contains `path`."""
    with suppress(FileNotFoundError):  # the working folder is gone
        run = next((parent for parent in path.absolute().parents if (parent / LOCK).is_file()), None)
        return user_of_run(run) if run else None
    return None
