"""Checksums of the files that a finished run has beside its adapter and checkpoints, which have their own. No torch.

They cover the checksums of the adapter too: an adapter without them would be taken for one of another tool.
"""

import os
from collections.abc import Callable
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, read_checksums, write_checksums
from lora_cli.run.folder import RECORDS

KIND = "run"  # in checksums.json


def write_run_checksums(run: Path) -> None:
    """Write the checksums of a run that is finished: of its recipe, manifest and logs, and of its adapter's."""
    names = [name for name in (*RECORDS, f"adapter/{CHECKSUMS_FILE}") if os.path.lexists(run / name)]
    write_checksums(run, kind=KIND, published=False, names=names, in_use=True)


def remove_run_checksums(run: Path, *, info: Callable[[str], None]) -> None:
    """Remove the checksums of a run that will be continued, before its files are written; report what has changed."""
    for line in find_changed_records(run):
        info(line)
    if os.path.lexists(run / CHECKSUMS_FILE):
        atomic.remove(run / CHECKSUMS_FILE)


def find_changed_records(run: Path) -> list[str]:
    """Return a line for each file of a finished run that is not as it was when the run ended; empty if there is none.

    They decide nothing that an adapter computes, so that a change is told, not refused.
    """
    try:
        record = read_checksums(run)
        changed = find_damage(run) if record is not None and record.kind == KIND else []
    except (LoraError, OSError) as error:
        changed = [error.message if isinstance(error, LoraError) else f"{CHECKSUMS_FILE}: {error.strerror}"]
    return [f"note: this run is not as it was when it ended: {line}" for line in changed]
