"""What `lora push` publishes of a result: its kind, the files of that kind, those left out, and its damage. No torch.

Each kind has a list of the files that belong to it. Another file is left out if it is known to be something else, such
as the state of an optimizer, and it is refused if nobody knows what it is: what is published can hardly be taken back.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run.checksums import CHECKSUMS_FILE, FileChecksum, checksum, list_files, read_checksums
from lora_cli.run.console import format_bytes
from lora_cli.run.folder import EXPORT_VERDICT, find_adapter_folder
from lora_cli.run.read_file import describe_kind, read_json_object
from lora_cli.run.shell import shell_path
from lora_cli.run.workspace import WORKSPACE
from lora_cli.setup.adapter_folders import check_not_unfinished
from lora_cli.setup.export_paths import verdict_path
from lora_cli.training import checkpoint_folders

Info = Callable[[str], None]

SLOW_BYTES = 2 << 30  # to read: it takes seconds
MAX_LISTED = 10  # problems in one error
HINT = "give a run of lora train, an adapter folder, a merged model, or an export"
# Files that their author writes or edits: a change since the checksums were written is no damage.
EDITED = r"README\.md|LICEN[CS]E[\w.-]*|NOTICE[\w.-]*|\.gitattributes"
_ALL = rf"{EDITED}|checksums\.json|export\.json"
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|(merges|vocab)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)
_CONFIG = r"config\.json|generation_config\.json|labels\.json|(preprocessor|processor|video_preprocessor)_config\.json"
_CODE = r"(configuration|modeling|modular|tokenization|processing|image_processing|video_processing)_\w+\.py"

# The files of each kind, as paths in the folder.
KINDS: dict[str, re.Pattern[str]] = {
    "adapter": re.compile(
        rf"adapter_config\.json|adapter_model\.safetensors|trained_on\.json|labels\.json|{_TOKENIZER}|{_ALL}"
    ),
    "Ollama model": re.compile(rf"Modelfile|[^/]+\.gguf|{_ALL}"),
    "ONNX model": re.compile(rf"[^/]+\.onnx([._]data)?|{_CONFIG}|{_TOKENIZER}|{_ALL}"),
    "model": re.compile(
        rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json|{_CONFIG}|{_CODE}|{_TOKENIZER}|{_ALL}"
    ),
    "GGUF model": re.compile(rf"[^/]+\.gguf|[^/]+\.export\.json|{_ALL}"),
}
_HOLDS_CODE = "pickle, which can run code when it is loaded"
_STATE = "state of a training run"
# Files that are known, and no part of any kind.
LEFT_OUT: dict[str, str] = {
    r"(.*/)?(\.git|\.cache|__pycache__|\.ipynb_checkpoints|\.venv)/.*": "of another program",
    r"(.*/)?(\.DS_Store|Thumbs\.db|\.gitignore|[^/]*~|[^/]*\.swp)": "of another program",
    r"(.*/)?\.tmp-.+-[0-9a-f]{8}/.*": "left by a command that was killed",
    r"\.lora-lock|(.*/)?\.lock-[^/]+": "a lock",
    r"(checkpoint-\d+|checkpoints|global_step\d+)/.*": "a checkpoint",
    r"(optimizer|scheduler|scaler)\.(pt|bin|safetensors)|rng_state[\w.-]*\.pth|training_args\.bin": _STATE,
    r"(trainer_state|all_results|train_results|eval_results|state)\.json|latest|zero_to_fp32\.py": _STATE,
    r"(runs|logs|wandb|mlruns)/.*|(.*/)?events\.out\.tfevents[^/]*|[^/]*\.log|[^/]*_log\.jsonl": "a log",
    r"(.*/)?[^/]+\.(bin|pt|pth|ckpt|pkl|pickle)": _HOLDS_CODE,
}


class PublishedFile(NamedTuple):
    """A file that is uploaded."""

    name: str  # in the repository
    path: Path
    size: int  # bytes
    sha256: str
    content: bytes | None = None  # in place of the content of `path`


class Publishable(NamedTuple):
    """A result whose files can be published."""

    kind: str
    target: Path  # the folder, or the file in it
    folder: Path
    names: list[str]
    left_out: dict[str, str]  # why, by name


def find_publishable(target: Path) -> Publishable:
    """Return the result that `target` is: a run, of which the adapter is published, an adapter, model or export.

    Raises:
        LoraError: it is none, or unfinished, or it has files of which nobody knows what they are.
    """
    if WORKSPACE.fullmatch(target.name):
        raise LoraError(f"{target} is the unfinished work of a command", hint=HINT)
    if target.suffix == ".gguf" and os.path.isfile(target):
        verdict = verdict_path(target)
        names = [target.name, *([verdict.name] if os.path.lexists(verdict) else [])]
        _check_names(target.parent, names, [])
        return Publishable("GGUF model", target, target.parent, names, {})
    if (folder := find_adapter_folder(target)) is None:
        if not os.path.exists(target):
            raise LoraError(f"{target} does not exist", hint=HINT)
        if not target.is_dir():
            raise LoraError(f"{target} is {describe_kind(target)}, no result of lora", hint=HINT)
        check_not_unfinished(target)
        folder = target
    record = read_checksums(folder)
    if record is not None and record.kind == checkpoint_folders.KIND:
        raise LoraError(
            f"{folder} is a checkpoint: it has the state of an optimizer too",
            hint=f"write its adapter alone, and push that: lora export {shell_path(folder)} --to peft --out FOLDER",
        )
    _kind_of(folder, os.listdir(folder))  # what is in a folder shows there: a home folder is not searched
    names = list_files(folder)
    kind = _kind_of(folder, names)
    chosen, left_out, unknown = [], {}, []
    for name in names:
        if KINDS[kind].fullmatch(name):
            chosen.append(name)
        elif (reason := _why_left_out(name)) is not None:
            left_out[name] = reason
        else:
            unknown.append(name)
    missing = sorted((record.files if record else {}).keys() - set(names))
    _check_names(folder, chosen, [*(f"{name} is missing" for name in missing), *(_unknown(n, kind) for n in unknown)])
    return Publishable(kind, folder, folder, chosen, left_out)


def _kind_of(folder: Path, names: list[str]) -> str:
    present = set(names)
    if "adapter_config.json" in present:
        if "config.json" in present:
            raise LoraError(
                f"{folder} is an adapter and a model: it has adapter_config.json and config.json",
                hint="move the files of one of them to another folder",
            )
        return "adapter"
    suffixes = {Path(name).suffix for name in names}
    if "Modelfile" in present:
        return "Ollama model"
    if ".onnx" in suffixes:
        return "ONNX model"
    if "config.json" in present:
        return "model"
    if ".gguf" in suffixes:
        return "GGUF model"
    raise LoraError(f"{folder} is no result of lora: it has no adapter, model or export", hint=HINT)


def _unknown(name: str, kind: str) -> str:
    return f"{name} is not known as a file of {'an' if kind[0] in 'aO' else 'a'} {kind}"


def _why_left_out(name: str) -> str | None:
    return next((reason for pattern, reason in LEFT_OUT.items() if re.fullmatch(pattern, name)), None)


def _check_names(folder: Path, names: Iterable[str], problems: list[str]) -> None:
    """Raise for `problems` with the names of files, and for links, whose targets are files of something else."""
    links = [f"{name} is a link, not a file" for name in names if (folder / name).is_symlink()]
    raise_problems(
        folder,
        [*links, *problems],
        hint="remove or move what is no part of it; restore what is missing, or write the result again",
    )


def raise_problems(folder: Path, problems: list[str], *, hint: str) -> None:
    """Raise one error for all problems, if there are any.

    Raises:
        LoraError: `problems` is not empty; its details are the first ones.
    """
    if not problems:
        return
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise LoraError(f"{folder} is not published: {count}", hint=hint, details=[*problems[:MAX_LISTED], *more])


def read_published(result: Publishable, *, info: Info) -> list[PublishedFile]:
    """Read all files of a result once, compare them with its checksums, and return them with their digests.

    A README.md or a license that was changed or added since is told, and the checksums are renewed for it.

    Raises:
        LoraError: a file is not as it was written, or cannot be read.
    """
    record = read_checksums(result.folder)
    expected = record.files if record is not None else {}
    sizes = [(result.folder / name).stat().st_size for name in result.names]
    if sum(sizes) > SLOW_BYTES:
        info(f"reading {result.folder}: {format_bytes(sum(sizes))}")
    found = {name: checksum(result.folder / name, sha256=True) for name in result.names}
    changed = [name for name, entry in expected.items() if name in found and found[name].xxh3 != entry.xxh3]
    damaged = [name for name in changed if not re.fullmatch(EDITED, name)]
    problems = [f"{name} has other contents than when it was written" for name in damaged]
    problems += _verdict_problems(result, found)
    raise_problems(result.target, problems, hint="write the result again, or restore it from a copy")
    files = [PublishedFile(name, result.folder / name, each.bytes, each.sha256 or "") for name, each in found.items()]
    if record is None:
        return files
    renewed = [name for name in found if name in changed or name not in (*expected, CHECKSUMS_FILE)]
    for name in renewed:
        info(f"note: {name} was {'changed' if name in changed else 'added'} after the result was written")
    return [_renew(file, {name: found[name] for name in renewed}) for file in files] if renewed else files


def _renew(file: PublishedFile, changes: dict[str, FileChecksum]) -> PublishedFile:
    """Return the file; if it is checksums.json, with other entries for `changes`."""
    if file.name != CHECKSUMS_FILE:
        return file
    record = read_json_object(file.path)
    record["files"] |= {name: entry._asdict() for name, entry in changes.items()}
    content = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return content_file(CHECKSUMS_FILE, file.path, content)


def content_file(name: str, path: Path, content: bytes) -> PublishedFile:
    """Return a file with other content than that of `path`."""
    return PublishedFile(name, path, len(content), hashlib.sha256(content).hexdigest(), content)


def _verdict_problems(result: Publishable, found: dict[str, FileChecksum]) -> list[str]:
    """Return a line for each exported file that is not the one whose checks its verdict (export.json) records."""
    problems = []
    for name in found:
        if not name.endswith(f".{EXPORT_VERDICT}"):
            continue
        exported = name.removesuffix(f".{EXPORT_VERDICT}") + ".gguf"
        entry = (read_json_object(result.folder / name).get("files") or {}).get(".") or {}
        if exported in found and entry.get("sha256") != found[exported].sha256:
            problems.append(f"{exported} is not the file that was exported and verified")
    return problems
