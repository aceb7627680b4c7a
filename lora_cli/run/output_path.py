"""Check where a command writes its result (--out): only results of this tool are replaced. No torch."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, list_files, read_checksums
from lora_cli.run.folder import CONFIG_FILE, RUN_FILES
from lora_cli.run.read_file import open_regular
from lora_cli.run.run_lock import LOCK
from lora_cli.run.workspace import remove_leftovers, reserve

# Files of an adapter or a model in the format of Hugging Face, as this and other tools write them.
FORMAT_FILE = re.compile(
    r"(adapter_config|adapter_model\.safetensors\.index|config|generation_config|model\.safetensors\.index"
    r"|preprocessor_config|processor_config|video_preprocessor_config|chat_template|special_tokens_map|added_tokens"
    r"|tokenizer|tokenizer_config|vocab|trained_on|labels|export|merge|checksums)\.json"
    r"|(adapter_model|model|model-\d{5}-of-\d{5})\.safetensors|tokenizer\.model|merges\.txt|vocab\.txt"
    r"|chat_template\.jinja|README\.md|\.gitattributes"
)
FORMAT_MARKS = (CONFIG_FILE, "config.json")  # a folder of the format has one of them
STDOUT = Path("-")
FILE_SUFFIXES = (".gguf", ".safetensors", ".onnx", ".bin", ".pt", ".zip")  # a folder of such a name would mislead
FILE_MAGIC = {".gguf": b"GGUF", ".json": b"{\n"}
# Files that are compared by content before they are replaced: larger ones are nobody's edited text.
MAX_COMPARED_BYTES = 16 << 20


@contextmanager
def reserve_output_path(out: Path) -> Iterator[None]:
    """Within the block, another command that writes to `out` is refused.

    Raises:
        LoraError: another command is writing to `out`.
    """
    with ExitStack() as stack:
        try:
            if out.name not in ("", ".."):
                stack.enter_context(reserve(out))
        except BlockingIOError as error:
            raise LoraError(
                f"--out {_shortened(out)} is being written by process {error}",
                hint="wait for it, or name another place",
            ) from None
        except (OSError, ValueError):
            pass  # a place that cannot be written, of which `check_output_path` says why
        yield


def check_output_path(out: Path, *, inputs: Iterable[Path], replace: bool, command: str, kind: str = "folder") -> None:
    """Check that `out` can be written, and remove what a killed command left there.

    Args:
        out: the value of --out.
        inputs: files and folders that the command reads; those that do not exist, such as hub ids, are passed over.
        replace: whether an existing `out` is replaced.
        command: merge, for example; for messages.
        kind: folder or file: what the command writes.

    Raises:
        LoraError: `out` is a link, the working folder or above it, is or contains an input, exists
            without `replace`, was not written by this tool, or its parent is missing or cannot be written.
    """
    another = f"name another {kind}"
    check_not_stdout("--out", out, kind=kind)
    if kind == "folder" and out.suffix.lower() in FILE_SUFFIXES:
        raise LoraError(f"--out {out} is the name of a file, and the {command} writes a folder", hint=another)
    mode = _mode(out, another)
    _check_place(out, another)
    for path in inputs:
        if not path.exists():
            continue
        if _real(out) == _real(path):
            raise LoraError(f"--out {out} is an input of the {command}", hint=another)
        if _real(out) in _real(path).parents:  # a run with its adapter, for example
            raise LoraError(f"--out {out} contains {path}, an input of the {command}", hint=another)
    if mode is not None and stat.S_ISLNK(mode):
        target = "" if out.exists() else ", and its target does not exist"
        raise LoraError(f"--out {out} is a link to {os.readlink(out)}{target}", hint="name the folder itself")
    _check_not_in_run(out, another)
    parent = out.absolute().parent
    remove_leftovers(parent, out.name)
    mode = _mode(out, another)
    if mode is None:
        return
    found = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device, pipe or socket"
    if found != kind:
        raise LoraError(f"--out {out} is a {found}, and the {command} writes a {kind}", hint=another)
    if not replace:
        raise LoraError(f"--out {out} exists", hint=f"{another}, or replace it with --force")
    if (reason := _why_not_ours(out) if kind == "folder" else _why_not_our_file(out)) is not None:
        raise LoraError(
            f"--out {out} is not replaced: {reason}", hint=f"--force replaces only results of lora: {another}"
        )


def check_not_stdout(option: str, path: Path, *, kind: str) -> None:
    """Raise if `path` is -, which stands for stdout: a file of this name would surprise.

    Raises:
        LoraError: it is; `kind` is what is written instead.
    """
    if path == STDOUT:
        raise LoraError(f"{option} - is standard output, and a {kind} is written", hint=f"name the {kind}")


def check_output_file(option: str, file: Path | None) -> None:
    """Check a file that an option names, such as --json, before the work of which it has the result.

    Raises:
        LoraError: it is stdout or a folder, or its folder is missing or cannot be written.
    """
    if file is None:
        return
    check_not_stdout(option, file, kind="file")
    parent = file.absolute().parent
    if not parent.is_dir():
        raise LoraError(f"{option} {file}: there is no folder {file.parent}", hint="make it first")
    if file.is_dir():
        raise LoraError(f"{option} {file} is a folder, and a file is written", hint="name a file in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise LoraError(
            f"{option} {file}: {file.parent} cannot be written", hint="check its permissions, or name another file"
        )


def _mode(out: Path, another: str) -> int | None:
    """Return the mode of `out`; None if it does not exist."""
    try:
        return os.lstat(out).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a name that is too long, a file as parent, a NUL character
        reason = error.strerror if isinstance(error, OSError) else "its name has a NUL character"
        raise LoraError(f"--out {_shortened(out)} cannot be written: {reason}", hint=another) from None


def _check_place(out: Path, another: str) -> None:
    """Check that the parent of `out` can be written, and that `out` is a name in it."""
    parent, working = out.absolute().parent, Path.cwd()
    if not out.name or out.name == ".." or _real(out) == working or _real(out) in working.parents:
        what = "is" if _real(out) == working else "contains"
        raise LoraError(f"--out {out} {what} the working folder", hint=another)
    if not parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise LoraError(f"--out {out}: {out.parent} cannot be written", hint=f"check its permissions, or {another}")


def _check_not_in_run(out: Path, another: str) -> None:
    parent = out.absolute().parent
    for run in (parent, parent.parent):
        # A result inside a run is a part of it, which only training may replace.
        inner = out.absolute().relative_to(run).parts[0]
        if os.path.lexists(run / LOCK) and inner in RUN_FILES:
            raise LoraError(f"--out {out} is a part of the run {run.name}", hint=another)


def _why_not_ours(folder: Path) -> str | None:
    """Return why a folder must not be replaced; None if all its files were written by this tool, or are of the format.

    Raises:
        LoraError: its record of checksums is damaged.
    """
    names = list_files(folder)
    record = read_checksums(folder)
    if record is None:
        if not names:
            return None if not any(folder.iterdir()) else "it contains folders"
        foreign = [name for name in names if not FORMAT_FILE.fullmatch(name) or (folder / name).is_symlink()]
        if foreign:
            return f"it contains {foreign[0]}, which lora did not write"
        return None if any(mark in names for mark in FORMAT_MARKS) else "it has no config.json or adapter_config.json"
    foreign = [name for name in names if name not in record.files and name != CHECKSUMS_FILE]
    if foreign:
        return f"it contains {foreign[0]}, which lora did not write"
    small = [name for name, entry in record.files.items() if entry.bytes <= MAX_COMPARED_BYTES and name in names]
    changed = find_damage(folder, small)
    return f"{changed[0]}" if changed else None


def _why_not_our_file(file: Path) -> str | None:
    magic = FILE_MAGIC.get(file.suffix, b"")
    with open_regular(file) as stream:
        return None if magic and stream.read(len(magic)) == magic else f"it is no {file.suffix.lstrip('.')} file"


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def _shortened(path: Path) -> str:
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"
