"""The folder of a run: made, locked against a second process, never mixed with other files. No torch."""

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from lora_cli.errors import LoraError
from lora_cli.run import atomic

LOCK = ".lora-lock"
# In the order that --fresh removes them.
OWN = ("adapter", "checkpoints", "metrics.jsonl", "logs", "manifest.json", "recipe.yaml")


class RunFolder:
    """An open run folder; its lock is held until it is closed or the process ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.stale: list[str] = []  # names of what `clear` removes
        self._lock: int | None = lock

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, identities, hashes, seeds and the data ledger."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """The journal: a line for each step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, `step-00000050` and so on."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    def clear(self) -> None:
        """Remove the run that was there. Not before the new one is about to begin: a mistake costs no finished run."""
        for name in self.stale:
            _remove(self.path / name)
        self.stale = []

    def close(self) -> None:
        """Give the lock back. The lock file stays: removing it would let two processes lock two files."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run(output: str | Path, *, resume: bool = False, fresh: bool = False) -> RunFolder:
    """Make or reopen the run folder `output`, and lock it.

    Args:
        output: the folder.
        resume: go on with the run in it, which must be there.
        fresh: a run that is in it is to be removed by `clear`, and nothing else.

    Raises:
        LoraError: where that cannot be done, or would touch what is no run's.
    """
    if resume and fresh:
        raise LoraError("--resume and --fresh are both given", hint="keep one")
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Before the lock, so that a folder of somebody's files is left without a trace.
        _refuse_foreign(path)
        run = RunFolder(path, _lock(path))
    except (FileExistsError, NotADirectoryError):
        raise LoraError(f"{path} is, or lies in, a file", hint="name a folder as output") from None
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror}"
        raise LoraError(reason, hint="name another folder as output") from None
    try:
        _prepare(run, resume=resume, fresh=fresh)
    except BaseException:
        run.close()
        raise
    return run


def _prepare(run: RunFolder, *, resume: bool, fresh: bool) -> None:
    for folder in (run.path, run.checkpoints):
        atomic.remove_leftovers(folder)
    there = [name for name in OWN if os.path.lexists(run.path / name)]
    if there and not (resume or fresh):
        hint = "--resume continues it, --fresh removes it and starts again; or name another output"
        raise LoraError(f"{run.path} holds a run already", hint=hint)
    if resume and not there:
        raise LoraError(f"there is no run in {run.path} to resume", hint="start it without --resume")
    if fresh:
        run.stale = there


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    # A `recipe.yaml` alone may well be the user's own, in the folder that `output: .` names.
    is_run = LOCK in names or {"recipe.yaml", "manifest.json"} <= names
    if names and not is_run:
        examples = ", ".join(sorted(names)[:3])
        raise LoraError(f"{path} holds files, but no run: {examples}", hint="name a new or empty folder as output")


def _lock(path: Path) -> int:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode().strip() or "another"
        os.close(lock)
        raise LoraError(
            f"{path} is in use by process {holder}", hint="wait for it, stop it, or name another output"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
