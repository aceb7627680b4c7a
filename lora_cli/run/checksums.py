"""Checksums of a written folder: `checksums.json`, the size and digests of each file, and its verification. No torch.

Each folder that the tool writes has this file: adapters, checkpoints, merged models, exports, cache entries. It is
written last. The xxh3 digest (128 bits) finds damage at the speed of the disk; results that are published have SHA-256
in addition, which nobody can forge.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import xxhash

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.read_file import open_regular, read_json_object

CHECKSUMS_FILE = "checksums.json"
TOOL = "lora-cli"  # value of the key `tool`: a folder of another program may have a file of the same name
BLOCK_BYTES = 1 << 20
NONE_KNOWN: Mapping[str, "FileChecksum"] = MappingProxyType({})


class FileChecksum(NamedTuple):
    """Size and digests of one file."""

    bytes: int
    xxh3: str  # XXH3 of 128 bits, hex
    sha256: str | None = None  # hex; of published results


class Checksums(NamedTuple):
    """The record of a folder."""

    kind: str  # adapter, checkpoint, merged model, export, cache entry or run
    files: dict[str, FileChecksum]  # by the path in the folder, with slashes
    key: str | None = None  # of a cache entry: the hash of what it was made from


@contextmanager
def verified_folder(path: Path, *, kind: str, published: bool, replace: bool, key: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder that is put at `path` with its checksums, see `atomic.folder` and `write_checksums`.

    Raises:
        FileExistsError: `path` exists and `replace` is False.
    """
    with atomic.folder(path, replace=replace) as partial:
        yield partial
        write_checksums(partial, kind=kind, published=published, key=key)


def write_checksums(
    folder: Path,
    *,
    kind: str,
    published: bool,
    key: str | None = None,
    known: Mapping[str, FileChecksum] = NONE_KNOWN,
    names: Sequence[str] | None = None,
    in_use: bool = False,
) -> None:
    """Write the checksums of the files in `folder` and below it. Call it after all other files are written.

    Args:
        folder: complete.
        kind: adapter, checkpoint, merged model, export, cache entry or run.
        published: whether other people get the folder: SHA-256 digests are added.
        key: of a cache entry, which tells it from another one that took its place.
        known: checksums of files that were written long before, so that damage since then is not taken for content.
        names: of the files; None for all.
        in_use: whether the folder is at its final place, where a reader must find the old or the new checksums.
    """
    if names is None:
        names = [name for name in list_files(folder) if name != CHECKSUMS_FILE]
    files = {name: known.get(name) or checksum(folder / name, sha256=published) for name in names}
    values = {name: _without_none(entry._asdict()) for name, entry in files.items()}
    record = {"tool": TOOL, "kind": kind, "key": key, "files": values}
    write = atomic.write_json if in_use else atomic.write_json_unpublished
    write(folder / CHECKSUMS_FILE, _without_none(record))


def read_checksums(folder: Path) -> Checksums | None:
    """Return the checksums of `folder`; None if it has none, such as an adapter of another tool.

    Raises:
        LoraError: the file is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not os.path.lexists(path):
        return None
    hint = f"restore {folder} from a copy; without {CHECKSUMS_FILE}, its files are read unverified"
    record = read_json_object(path, hint=hint)
    if record.get("tool") != TOOL:
        return None
    files = record.get("files")
    if not isinstance(record.get("kind"), str) or not isinstance(files, dict):
        raise LoraError(f"{path} is damaged: it has no kind or no files", hint=hint)
    entries = {name: _entry(name, value, path=path, hint=hint) for name, value in files.items()}
    return Checksums(record["kind"], entries, record.get("key"))


def find_damage(folder: Path, names: Iterable[str] | None = None, *, follow_links: bool = False) -> list[str]:
    """Compare the files of `folder` with its checksums, and return a line for each that differs.

    Args:
        folder: with or without checksums.
        names: files to compare; None for all files of the record. Files that are not in the record are not compared.
        follow_links: whether a link counts as the file that it names, as in the cache of the hub.

    Returns:
        Lines such as `optimizer.safetensors is missing`; empty if all files are as written, or without checksums.

    Raises:
        LoraError: checksums.json itself is damaged.
    """
    record = read_checksums(folder)
    if record is None:
        return []
    chosen = record.files if names is None else {name: record.files[name] for name in names if name in record.files}
    return compare(folder, chosen, follow_links=follow_links)


def compare(folder: Path, expected: Mapping[str, FileChecksum], *, follow_links: bool = False) -> list[str]:
    """Compare files of `folder` with their checksums, and return a line for each that differs, as `find_damage`."""
    lines = (_difference(folder / name, name, entry, follow_links) for name, entry in expected.items())
    return [line for line in lines if line]


def _difference(path: Path, name: str, expected: FileChecksum, follow_links: bool) -> str | None:
    if not os.path.lexists(path):
        return f"{name} is missing"
    if path.is_symlink() and not (follow_links and path.is_file()):
        return f"{name} is a link, not a file"
    if not path.is_file():
        return f"{name} is {'a folder' if path.is_dir() else 'no file'}"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{name} has {size:,} bytes, not {expected.bytes:,}"
    if checksum(path).xxh3 != expected.xxh3:
        return f"{name} has other contents than when it was written"
    return None


def list_files(folder: Path) -> list[str]:
    """Return the paths of all entries in `folder` and below it that are not folders, with slashes, sorted.

    Raises:
        OSError: a folder cannot be listed.
    """
    names = []
    for parent, folders, files in os.walk(folder, onerror=atomic.raise_error):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def checksum(path: Path, *, sha256: bool = False) -> FileChecksum:
    """Read a file once, in blocks, and return its size and digests.

    Raises:
        LoraError: it is not a regular file.
    """
    fast, strong, size = xxhash.xxh3_128(), hashlib.sha256() if sha256 else None, 0
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            size += len(block)
            fast.update(block)
            if strong is not None:
                strong.update(block)
    return FileChecksum(size, fast.hexdigest(), strong.hexdigest() if strong else None)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _entry(name: str, value: Any, *, path: Path, hint: str) -> FileChecksum:
    fields = value if isinstance(value, dict) else {}
    size, fast, strong = fields.get("bytes"), fields.get("xxh3"), fields.get("sha256")
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if type(size) is not int or not isinstance(fast, str) or not isinstance(strong, str | None) or not inside:
        raise LoraError(f"{path} is damaged: its entry of {name[:80]!r} is no checksum", hint=hint)
    return FileChecksum(size, fast, strong)
