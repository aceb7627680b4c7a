"""The metrics log `metrics.jsonl`: one JSON object per line, readable even after the run was killed. No torch.

A kill leaves at most the last line incomplete, which the next start removes. Other damage (a power cut, a full disk of
another program, an editor) is reported; the damaged log is set aside, and its readable records are kept.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.read_file import UnreadableError, open_regular
from lora_cli.run.set_aside import set_aside
from lora_cli.run.system_errors import as_os_error

READ_BYTES = 4 << 20  # of one call that follows a log
MAX_LINE_BYTES = 64 << 20  # a record of answers can have long texts; a damaged line can be of any length

Info = Callable[[str], None]


class MetricsLog:
    """Appends records to a file; when `write` returns, the complete record is in the file."""

    def __init__(self, path: Path) -> None:
        """Open the log. An incomplete last line is removed.

        Raises:
            LoraError, OSError: something else is in the place of the log.
        """
        self._path = path
        complete = sum(line.size for line in _lines(path)) if os.path.lexists(path) else 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        # Unbuffered: one write call per line, so a kill leaves at most the last line incomplete.
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
        self._file.truncate(complete)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record.

        Raises:
            ValueError: a number in it is not finite, which JSON cannot represent; nothing is written.
            OSError: the disk is full; the log is named.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with as_os_error(self._path):
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
    """Return all readable records, each with its `step`; empty if there is no such file.

    Raises:
        UnreadableError: the system refuses to open it.
    """
    try:
        return [line.record for line in _lines(path) if line.record is not None]
    except UnreadableError:
        raise
    except LoraError:
        return []


def truncate_after(path: Path, step: int, *, info: Info, complete_from: int | None = None) -> None:
    """Remove the records of steps after `step`, which a run that resumes after `step` writes again.

    A damaged log is reported and set aside; its readable records are kept.

    Args:
        path: of the log; it may be missing.
        step: last step that is kept; below 0 for none.
        info: prints what is damaged, in one line.
        complete_from: step from which on the log must have a record with a `loss` of every step; those that it lacks
            are reported. None: it need not have any.

    Raises:
        UnreadableError: the system refuses to open it.
        OSError: the log cannot be written.
    """
    kept, problem = [], None
    steps: set[int] = set()
    exists = os.path.lexists(path)
    try:
        for line in _lines(path) if exists else ():
            problem = problem or line.problem
            if line.record is not None and line.record["step"] <= step:
                kept.append(line.text)
                if "loss" in line.record:
                    steps.add(line.record["step"])
    except UnreadableError:
        raise
    except (LoraError, OSError) as error:
        problem = error.message.removeprefix(f"{path} ") if isinstance(error, LoraError) else error.strerror
    expected = range(step + 1 if complete_from is None else complete_from, step + 1)
    missing = [number for number in expected if number not in steps]
    if problem is not None:
        aside = set_aside(path)
        info(f"{path} is damaged: {problem}; set aside as {aside.name}, {len(kept):,} readable records are kept")
    elif missing:
        info(f"{path} lacks the records of {len(missing):,} of {step:,} steps, the first is step {missing[0]:,}")
    text = b"".join(kept)
    if problem is not None or (exists and path.stat().st_size != len(text)):
        atomic.write_bytes(path, text)


def remove_evaluation(path: Path, step: int) -> None:
    """Remove the record of the evaluation after `step`, which is made again; the log has been through `truncate_after`.

    Raises:
        OSError: the log cannot be written.
    """
    lines = list(_lines(path)) if path.is_file() else []
    kept = [
        line
        for line in lines
        if line.record is None or not ("eval_loss" in line.record and line.record["step"] == step)
    ]
    if len(kept) < len(lines):
        atomic.write_bytes(path, b"".join(line.text for line in kept))


class MetricsFollower:
    """Reads the records of a log that another process writes, each once, also after the log was written anew.

    The libraries of a tracker may close the descriptor of the log, and open another file under its number: it is looked
    at before it is used.
    """

    def __init__(self, path: Path) -> None:
        """`path` need not exist yet."""
        self._path = path
        self._descriptor: int | None = None
        self._opened: os.stat_result | None = None  # of the log that was read last
        self._offset = 0  # bytes that were read
        self._rest = b""  # an incomplete last line

    def read(self, *, reopen: bool = True) -> list[dict[str, Any]]:
        """Return the records since the last call; after the log was replaced, all of its records.

        Without `reopen`, a log that is in its place now belongs to another run, and is not read.

        Raises:
            OSError: it cannot be read.
        """
        if (not self._is_open() or (reopen and self._is_replaced())) and not self._open(reopen=reopen):
            return []
        assert self._descriptor is not None
        parts, offset = [self._rest], self._offset
        while data := os.pread(self._descriptor, READ_BYTES, offset):
            parts.append(data)
            offset += len(data)
        *lines, self._rest = b"".join(parts).split(b"\n")
        self._offset = offset
        return [record for line in lines if (record := _record(line)) is not None]

    def close(self) -> None:
        """Close the log."""
        if self._descriptor is not None and self._is_open():
            os.close(self._descriptor)
        self._descriptor = None

    def _open(self, *, reopen: bool) -> bool:
        """Open the log; return whether there is one to be read."""
        self.close()
        try:
            with open_regular(self._path) as file:
                found = os.fstat(file.fileno())
                is_same = self._opened is not None and os.path.samestat(found, self._opened)
                if self._opened is not None and not is_same and not reopen:
                    return False
                self._descriptor = os.dup(file.fileno())
        except LoraError:  # not written yet
            return False
        if not is_same or found.st_size < self._offset:
            self._offset, self._rest = 0, b""
        self._opened = found
        return True

    def _is_open(self) -> bool:
        if self._descriptor is None or self._opened is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._opened)
        except OSError:
            return False

    def _is_replaced(self) -> bool:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:  # moved: its writer still has it
            return False
        return self._opened is None or not os.path.samestat(found, self._opened) or found.st_size < self._offset


class _Line(NamedTuple):
    size: int  # bytes, with the line break
    text: bytes  # empty if it is too long
    record: dict[str, Any] | None  # None if the line is damaged
    problem: str | None


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a log, without an incomplete last line.

    Raises:
        LoraError: it is missing, no regular file, or cannot be read.
    """
    with open_regular(path) as file:
        number = 0
        while text := file.readline(MAX_LINE_BYTES):
            number += 1
            size, rest = len(text), text
            while not rest.endswith(b"\n"):
                if not (rest := file.readline(MAX_LINE_BYTES)):
                    return  # the last line, which was cut off
                size += len(rest)
            if size > len(text):
                yield _Line(size, b"", None, f"line {number:,} has {size:,} bytes")
                continue
            record = _record(text)
            problem = f"line {number:,} is no record of a step" if record is None else None
            yield _Line(size, text, record, problem)


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if it is not a JSON object with a step."""
    try:
        record = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # brackets nested thousands deep
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and step >= 0 else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
