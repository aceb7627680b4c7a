"""`metrics.jsonl`: one JSON object a line, appended as the run goes, readable after any kill. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_cli.errors import LoraError
from lora_cli.run import atomic


class MetricsLog:
    """Appends records to a file; each is in the file, whole, when `write` returns."""

    def __init__(self, path: Path) -> None:
        whole = b"".join(_whole_lines(path))
        # Unbuffered: one write call a line, so a kill leaves at most the last line torn.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(len(whole))

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record.

        Raises:
            ValueError: where a number in it is not finite, which JSON cannot hold.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        while line:  # a disk that fills up takes a part first, and refuses the rest at the next call
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that a kill has torn is left out."""
    return [_record(line, path, number) for number, line in enumerate(_whole_lines(path), 1)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps, which a run that resumes at `step` will write again."""
    lines = _whole_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if int(_record(line, path, number).get("step", 0)) <= step]
    if path.exists():
        atomic.write_bytes(path, b"".join(kept))


def _whole_lines(path: Path) -> list[bytes]:
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
