"""Turn an error of the system that the user can mend into a LoraError: message, hint, exit code. No torch."""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.console import format_bytes
from lora_cli.run.run_lock import LOCK, user_of_run
from lora_cli.run.system_errors import HINTS, VANISHED, describe

# torch has no exception class of its own for these: of the CPU, of CUDA outside of its allocator, of cuBLAS.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
ALLOCATED = re.compile(r"allocate (\d+) bytes|allocate (?P<size>[\d.]+ [KMGT]iB)")  # torch, on the CPU and on GPUs


def as_lora_error(error: OSError | MemoryError | RuntimeError) -> LoraError | None:
    """Return the error to show for `error`; None if it is a bug, which keeps its traceback."""
    if not isinstance(error, OSError):
        return _out_of_memory(error) if is_out_of_memory(error) else None
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # safetensors gives no number
    if number not in HINTS:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    hint = HINTS[number]
    if hint == VANISHED and path and (user := _user(Path(path))) is not None:
        hint = f"process {user} is training in this run: wait for it, or copy the adapter first"
    return LoraError(describe(error), hint=hint, exit_code=1)


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether memory could not be allocated, by Python or by torch on any device."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error) for text in OUT_OF_MEMORY)


def _out_of_memory(error: MemoryError | RuntimeError) -> LoraError:
    match = ALLOCATED.search(str(error))
    size = "" if match is None else f": {match['size'] or format_bytes(int(match[1]))} could not be allocated"
    place = "the GPU" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    return LoraError(f"{place} has too little memory{size}", hint=HINTS[errno.ENOMEM], exit_code=1)


def _user(path: Path) -> str | None:
    """Return the id of the process that has locked the run which contains `path`."""
    with suppress(FileNotFoundError):  # the working folder is gone
        run = next((parent for parent in path.absolute().parents if (parent / LOCK).is_file()), None)
        return user_of_run(run) if run else None
    return None
