"""The run folder: created or reopened, locked against other processes, without files of other programs. No torch."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lora_cli.errors import LoraError, one_line
from lora_cli.run import atomic
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.read_file import describe_kind, read_json_object
from lora_cli.run.run_lock import LOCK, lock_run, user_of_run
from lora_cli.run.run_results import list_results
from lora_cli.run.set_aside import original_name
from lora_cli.run.system_errors import system_error
from lora_cli.run.workspace import remove_leftovers, sync

BASE = "base"  # name of the base model among the adapters of a command
MERGE_VERDICT = "merge.json"  # in a merged model
EXPORT_VERDICT = "export.json"  # in an exported folder; beside an exported file, with its name before it
CONFIG_FILE = "adapter_config.json"  # of an adapter, by PEFT's name
PAGE = "report.html"  # of `lora report`, in the folder of a run
FAILURE = "failed.json"  # in the folder of a run that an error ended: the error; the continued run removes it
# Files of a run that its checksums.json covers once it is finished.
RECORDS = ("metrics.jsonl", "answers.jsonl", "manifest.json", "recipe.yaml")
# Files and folders of a run, in the order in which --fresh moves them aside.
FOLDERS = ("adapter", "checkpoints", "tracking")
RUN_FILES = ("checksums.json", FAILURE, *FOLDERS, *RECORDS)
NO_RUN = "start it without --resume; to resume a run that was moved, give the recipe.yaml in its folder"
EARLIER = "earlier-{}"  # folders in a run: earlier runs that --fresh moved aside
MOVING = ".moving"  # a file in such a folder: not all files of the run are in it yet


class RunFolder:
    """An open run folder, locked until it is closed or the process ends."""

    def __init__(self, path: Path, lock: int, arguments: Sequence[str] = ()) -> None:
        self.path = path
        self.arguments = list(arguments)  # of the command line that trains the run
        self.stale: list[str] = []  # names of files of an earlier run, which `move_earlier_aside` moves
        self._lock: int | None = lock
        self._begun = False

    def begin(self) -> None:
        """Note that this process trains the run: from now on, its failure replaces that of an earlier process."""
        if os.path.lexists(self.path / FAILURE):
            atomic.remove(self.path / FAILURE)
        self._begun = True

    def _record_failure(self, error: BaseException) -> None:
        """Write the error that ends the run as the terminal gets it, so that `lora runs` and `lora report` show it."""
        found: BaseException | None = system_error(error) or error
        if isinstance(found, OSError | MemoryError | RuntimeError):
            found = as_lora_error(found)
        message, hint = (found.message, found.hint) if isinstance(found, LoraError) else (one_line(repr(error)), None)
        with suppress(OSError):  # a full disk, for example, which is what the error says
            atomic.write_json(self.path / FAILURE, {"error": message, "hint": hint})

    @property
    def recipe(self) -> Path:
        """Path of the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Path of the manifest: versions, identities, hashes, seeds and the data ledger."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """Path of the metrics log: a line for each step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def answers(self) -> Path:
        """Path of the answers to held-out prompts during training, if `training.answer_every` is set."""
        return self.path / "answers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints: `step-00000050` and so on."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the final adapter."""
        return self.path / "adapter"

    @property
    def tracking(self) -> Path:
        """Folder of the experiment trackers, if the recipe names some: their files, ids and logs."""
        return self.path / "tracking"

    def move_earlier_aside(self) -> Path | None:
        """Move the files of the earlier run to a folder of their own in the run folder; nothing is deleted.

        What `lora report` and `lora eval` have written there is moved too, as it is on that run.

        Call it right before training, so that an error before it leaves the run as it is.

        Returns:
            The folder, itself a run folder; None if there is no earlier run.
        """
        if not self.stale:
            return None
        number = 1
        while os.path.lexists(folder := self.path / EARLIER.format(number)) and not _is_empty(folder):
            number += 1
        folder.mkdir(exist_ok=True)
        (folder / MOVING).touch()
        sync(folder)
        _complete_move(folder)
        self.stale = []
        return folder

    def close(self) -> None:
        """Release the lock. The lock file stays: after its removal, two processes could lock two different files."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun and isinstance(error, Exception):
            self._record_failure(error)
        self.close()


def open_run(
    output: str | Path, *, resume: bool = False, fresh: bool = False, arguments: Sequence[str] = ()
) -> RunFolder:
    """Create or reopen the run folder `output`, and lock it.

    Args:
        output: the folder.
        resume: continue the run in it, which must exist.
        fresh: let `move_earlier_aside` move the files of an existing run, and nothing else.
        arguments: of the command line, which the manifest records.

    Raises:
        LoraError: the folder cannot be written, is locked, contains files of something else or links in place of the
            run's files, contains a run without `resume` or `fresh`, or contains no run to resume.
    """
    path = Path(output)
    _check_request(path, resume=resume, fresh=fresh)  # before it is created
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Before the lock file is created, so that a folder with other files stays unchanged.
        _check_no_foreign_files(path)
        run = RunFolder(path, lock_run(path), arguments)
    except (FileExistsError, NotADirectoryError):
        raise LoraError(f"{path} is a file, or inside a file", hint="set output to a folder") from None
    except OSError as error:
        copy = "copy it, with cp -r, and resume the copy: lora train COPY/recipe.yaml --resume"
        hint = copy if resume else "set output to another folder"
        raise LoraError(f"{path} cannot be written: {error.strerror}", hint=hint) from None
    try:
        _prepare(run, resume=resume, fresh=fresh)
    except BaseException:
        run.close()
        raise
    return run


def check_start(output: str | Path, *, resume: bool, fresh: bool) -> None:
    """Raise what `open_run` would, as far as that shows without the lock of the folder; nothing is written.

    Raises:
        LoraError: `output` contains a run without `resume` or `fresh`, or no run to resume.
    """
    path = Path(output)
    _check_request(path, resume=resume, fresh=fresh)
    if resume or fresh or not os.path.isdir(path):  # False for a name that is too long
        return
    if user_of_run(path) is None and not _unfinished_moves(path) and _run_files(path) and is_run(path):
        raise _contains_run(path)


def _check_request(path: Path, *, resume: bool, fresh: bool) -> None:
    if resume and fresh:
        raise LoraError("--resume and --fresh are both set", hint="keep one")
    if resume and not os.path.isdir(path):
        raise LoraError(f"{path} contains no run to resume", hint=NO_RUN)


def _contains_run(path: Path) -> LoraError:
    hint = "--resume continues it, --fresh moves it aside and starts again; or set another output"
    return LoraError(f"{path} contains a run already", hint=hint)


def _unfinished_moves(path: Path) -> list[Path]:
    """Return the markers of moves to folders of earlier runs that a kill has stopped."""
    return list(path.glob(f"{EARLIER.format('*')}/{MOVING}"))


def _run_files(path: Path) -> list[str]:
    return [name for name in RUN_FILES if os.path.lexists(path / name)]


def _prepare(run: RunFolder, *, resume: bool, fresh: bool) -> None:
    for folder in (run.path, run.checkpoints):
        remove_leftovers(folder)
    for marker in _unfinished_moves(run.path):
        if not marker.parent.is_symlink():
            _complete_move(marker.parent)
    existing = _run_files(run.path)
    for name in existing if not fresh else ():
        # Writing through a link would change files outside the run.
        if (run.path / name).is_symlink():
            hint = "replace it by the folder or file that it links to; the run folder itself may be a link"
            raise LoraError(f"{run.path / name} is a link to {os.readlink(run.path / name)}", hint=hint)
        if name in FOLDERS and not (run.path / name).is_dir():
            hint = "move it elsewhere: --resume goes on from the checkpoints that are left, or from the first step"
            raise LoraError(f"{run.path / name} is {describe_kind(run.path / name)}, not a folder", hint=hint)
    if existing and not (resume or fresh):
        raise _contains_run(run.path)
    if resume and not existing:
        raise LoraError(f"{run.path} contains no run to resume", hint=NO_RUN)
    if fresh:
        run.stale = existing


def _check_no_foreign_files(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if names and not is_run(path):
        examples = ", ".join(sorted(names)[:3])
        raise LoraError(f"{path} contains files but no run: {examples}", hint="set output to a new or empty folder")


def is_run(path: Path) -> bool:
    """Return whether `path` is the folder of a run: locked by one once, or with the manifest of one."""
    if os.path.lexists(path / LOCK):
        return True
    # A run that was copied without hidden files. A recipe.yaml and a manifest.json alone may be the user's own.
    try:
        manifest = read_json_object(path / "manifest.json")
    except LoraError:
        return False
    versions = manifest.get("versions")
    return isinstance(versions, dict) and "lora-cli" in versions and (path / "recipe.yaml").is_file()


def _complete_move(folder: Path) -> None:
    """Move the files of the earlier run that are not in `folder` yet; those of a new one are written afterwards."""
    for name in (*RUN_FILES, *_damaged_files(folder.parent), *list_results(folder.parent)):
        if os.path.lexists(folder.parent / name) and not os.path.lexists(folder / name):
            (folder.parent / name).rename(folder / name)
    sync(folder)
    sync(folder.parent)
    (folder / MOVING).unlink()
    sync(folder)


def _damaged_files(folder: Path) -> list[str]:
    """Return the names of the files of a run that were set aside as damaged."""
    return [name for name in sorted(os.listdir(folder)) if original_name(name) in RUN_FILES]


def _is_empty(folder: Path) -> bool:
    """Return whether `folder` is one that a kill has left before anything was moved to it."""
    return not folder.is_symlink() and folder.is_dir() and not any(folder.iterdir())


def recipe_of_adapter(folder: Path) -> Path | None:
    """Return the recipe.yaml of the run whose adapter or checkpoint is in `folder`; None if it is not part of a run."""
    recipe = run_of_adapter(folder) / "recipe.yaml"
    return recipe if recipe.is_file() else None


def run_of_adapter(folder: Path) -> Path:
    """Return the folder of the run whose adapter or checkpoint is in `folder`, if it is part of a run."""
    parent = folder.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def is_path(text: str) -> bool:
    """Return whether a name of a model can only be a path, and no hub id `org/name`, whatever there is.

    A name in a folder of runs is a path: `runs/none` is a run that does not exist.
    """
    path = Path(text)
    if path.is_absolute() or text.startswith(("./", "../", "~")) or text.endswith("/") or text.count("/") > 1:
        return True
    if text.count("/") != 1:
        return False
    try:
        beside = any(os.path.lexists(each / LOCK) for each in path.parent.iterdir())
    except OSError:  # there is no such folder, or it cannot be read
        beside = False
    return beside or path.parent.name == "runs"


def find_adapter_folder(target: Path) -> Path | None:
    """Return the adapter folder that `target`, an adapter or a run folder, is or contains; None if there is none."""
    # A configuration that is a folder or a broken link is damage, which is reported where it is read.
    return next((each for each in (target, target / "adapter") if os.path.lexists(each / CONFIG_FILE)), None)
