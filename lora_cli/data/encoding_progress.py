"""How far the encoding of a source is: saved after each complete file, verified before the encoding continues."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from lora_cli.data.class_labels import LabelTable, SourceLabels
from lora_cli.data.encode_classes import RowEncoder
from lora_cli.data.examples import BadRows, Unread
from lora_cli.data.ledger import Tally
from lora_cli.data.records import BadRow, Finding
from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.checksums import FileChecksum, compare
from lora_cli.run.read_file import read_json_object

PROGRESS_FILE = "progress.json"
PART_NAME = "part-{:05}.arrow"


@dataclass
class Progress:
    """What an interrupted encoding continues with."""

    tally: Tally
    parts: dict[str, FileChecksum] = field(default_factory=dict)  # complete files of encoded rows, by name, in order
    overlong: list[str] = field(default_factory=list)  # the first rows that are too long
    bad: BadRows = field(default_factory=BadRows)
    table: LabelTable = field(default_factory=LabelTable)

    def save(self, folder: Path, key: str, unread: Unread, encoder: RowEncoder) -> None:
        """Write the progress of the cache entry `key` into `folder`."""
        # Without the keys that the template of the rows so far reads: a later process may not use this template again.
        keys = {key: count for key, count in unread.keys.items() if not encoder.template_reads(key)}
        counts = {"ignored": dict(unread.columns), "unread_keys": keys}
        values: dict[str, Any] = {
            "key": key,
            "tally": {**self.tally.to_json(), "labels": self.table.to_dict(), **counts},
            "parts": {name: [entry.bytes, entry.xxh3] for name, entry in self.parts.items()},
            "overlong": self.overlong,
            "bad": [[where, bad.reason, bad.problem, bad.field] for where, bad in self.bad.first],
            "reasons": self.bad.reasons,
            "hints": self.bad.hints,
        }
        values = json.loads(json.dumps(values))  # as it is read again
        atomic.write_json(folder / PROGRESS_FILE, {"progress": values, "xxh3": _digest(values)})


def load_progress(folder: Path, key: str, *, info: Callable[[str], None]) -> Progress | None:
    """Return the progress of an interrupted encoding of the cache entry `key`, verified with its files.

    Returns:
        None if there is none, or if something is damaged, which is reported.
    """
    path = folder / PROGRESS_FILE
    if not folder.is_dir() or folder.is_symlink() or not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise LoraError(f"{PROGRESS_FILE} is a link, not a file")
        stored = read_json_object(path)
        values = stored.get("progress")
        if not isinstance(values, dict) or stored.get("xxh3") != _digest(values) or values.get("key") != key:
            raise LoraError(f"{PROGRESS_FILE} has other contents than when it was written")
        parts = {name: FileChecksum(size, xxh3) for name, (size, xxh3) in values["parts"].items()}
        if damage := compare(folder, parts):
            raise LoraError(damage[0])
    except LoraError as error:
        info(f"cache: {folder} is damaged: {error.message}; its encoding starts anew")
        return None
    progress = Progress(Tally.from_json(values["tally"]), parts, values["overlong"])
    if progress.tally.labels is not None:
        progress.table = LabelTable(SourceLabels(**progress.tally.labels))
    progress.bad.reasons.update(values["reasons"])
    progress.bad.hints.update(values["hints"])
    progress.bad.first = [
        Finding(where, BadRow(reason, problem, field=name)) for where, reason, problem, name in values["bad"]
    ]
    return progress


def keep_only(folder: Path, progress: Progress | None) -> None:
    """Make `folder` contain the complete files of `progress` and its record, and nothing else; create it if missing.

    Files of a damaged entry or of an encoding that starts anew must not be taken for new ones.
    """
    if progress is None or not folder.is_dir() or folder.is_symlink():
        if folder.exists() or folder.is_symlink():
            atomic.remove(folder)
        folder.mkdir()
        return
    for entry in folder.iterdir():
        if entry.name not in (PROGRESS_FILE, *progress.parts):
            atomic.remove(entry)


def _digest(values: dict[str, Any]) -> str:
    """Return the xxh3 (128 bits, hex) of JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
