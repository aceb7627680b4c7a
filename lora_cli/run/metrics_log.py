"""The metrics log `metrics.jsonl`: one JSON object per line, readable even after the run was killed. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_cli.errors import LoraError
from lora_cli.run import atomic


class MetricsLog:
    """Appends records to a file; when `write` returns, the complete record is in the file."""

    def __init__(self, path: Path) -> None:
        complete = b"".join(_complete_lines(path))
        # Unbuffered: one write call per line, so a kill leaves at most the last line incomplete.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(len(complete))

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record.

        Raises:
            ValueError: a number in it is not finite, which JSON cannot represent; nothing is written.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        while line:  # if the disk gets full, a call writes only a part, and the next call fails
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records, without an incomplete last line; empty if the file does not exist.

    Raises:
        LoraError: a line is not a JSON object.
    """
    return [_record(line, path, number) for number, line in enumerate(_complete_lines(path), 1)]


def truncate_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, which a run that resumes after `step` writes again.

    Raises:
        LoraError: a line is not a JSON object.
    """
    lines = _complete_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if int(_record(line, path, number).get("step", 0)) <= step]
    if path.exists():
        atomic.write_bytes(path, b"".join(kept))


def _complete_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise LoraError(f"{path}:{number}: not a JSON object", hint="the file was edited: remove the line")
    return record
