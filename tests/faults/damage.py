"""Damage files and folders in named, seeded ways, as disks, power cuts and other programs do; for tests and campaigns.

`damages(path, seed=...)` enumerates damages of an intact file or folder. Each one is applied to a copy of it:

    for damage in damages(intact, seed=7):
        copy = fresh_copy(intact)
        damage.apply(copy)
        ...  # damage.name in the message of a failure: the same seed gives the same damages with the same names

Sockets and devices are left out: creating a device needs root, and a pipe stands for both.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 4096  # of a file system: what a power cut leaves as zeros


class Damage(NamedTuple):
    """One damage of a file, or of one file in a folder."""

    name: str  # kind and file: `flip-bit state.json`
    apply: Callable[[Path], None]  # takes a copy of the intact file or folder, and changes it in place


def damages(
    path: Path, *, seed: int, other: Path | None = None, kinds: Iterable[str] = (), repeats: int = 1
) -> Iterator[Damage]:
    """Yield damages of the intact `path`, file by file in sorted order, kind by kind.

    Args:
        path: a file, or a folder whose files (also in folders below) are damaged, each on its own.
        seed: chooses offsets and bits. The same seed and contents give the same damages.
        other: an intact file or folder of the same sort, such as another cache entry. Its file of the same name takes
            the place of the damaged one (kind `foreign`), and for a folder, it takes the place of the whole.
        kinds: of FILE_DAMAGES, `link-in-place`, `swap`, `foreign` and those of FOLDER_DAMAGES; empty for all.
        repeats: number of damages of each kind of RANDOM for each file, at different offsets.
    """
    chosen = set(kinds) or {*FILE_DAMAGES, "link-in-place", "swap", "foreign", *FOLDER_DAMAGES}
    is_folder = path.is_dir()
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if is_folder else ["."]
    for name in names:
        label = name if is_folder else path.name
        for kind in (kind for kind in FILE_DAMAGES if kind in chosen):
            for number in range(repeats if kind in RANDOM else 1):
                suffix = f" {number}" if number else ""
                yield Damage(f"{kind} {label}{suffix}", _on_file(kind, name, f"{seed} {kind} {label} {number}"))
        if "link-in-place" in chosen:
            yield Damage(f"link-in-place {label}", lambda copy, a=name: _link_outside(copy, a))
        partners = [n for n in names if n != name and (path / n).read_bytes() != (path / name).read_bytes()]
        if "swap" in chosen and partners:
            partner = random.Random(f"{seed} swap {label}").choice(partners)
            yield Damage(f"swap {label} with {partner}", lambda copy, a=name, b=partner: _swap(copy / a, copy / b))
        source = other / name if other is not None and "foreign" in chosen else None
        if source is not None and source.is_file() and source.read_bytes() != (path / name).read_bytes():
            yield Damage(f"foreign {label}", lambda copy, a=name, b=source: _replace_by(copy / a, b))
    if not is_folder:
        return
    for kind in (kind for kind in FOLDER_DAMAGES if kind in chosen):
        yield Damage(f"{kind} {path.name}/", FOLDER_DAMAGES[kind])
    if "foreign" in chosen and other is not None:
        yield Damage(f"foreign {path.name}/", lambda copy: _replace_by(copy, other))


def _on_file(kind: str, name: str, seed: str) -> Callable[[Path], None]:
    def apply(copy: Path) -> None:
        FILE_DAMAGES[kind](copy / name, random.Random(seed))

    return apply


def flip_bit(file: Path, chosen: random.Random) -> None:
    """Flip one bit; an empty file gets a byte instead."""
    size = file.stat().st_size
    if not size:
        file.write_bytes(b"\x01")
        return
    at = chosen.randrange(size)
    with file.open("r+b") as stream:
        stream.seek(at)
        (value,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([value ^ 1 << chosen.randrange(8)]))


def truncate(file: Path, chosen: random.Random) -> None:
    """Cut the file off at a random place."""
    os.truncate(file, chosen.randrange(max(1, file.stat().st_size)))


def empty(file: Path, _: random.Random) -> None:
    """Leave zero bytes."""
    os.truncate(file, 0)


def append(file: Path, chosen: random.Random) -> None:
    """Add random bytes at the end."""
    with file.open("ab") as stream:
        stream.write(chosen.randbytes(chosen.randint(1, 100)))


def zero_block(file: Path, chosen: random.Random) -> None:
    """Replace a block of the file system by zeros, as a power cut does; an empty file becomes a block of zeros."""
    size = file.stat().st_size
    begin = chosen.randrange(max(1, size)) // BLOCK_BYTES * BLOCK_BYTES
    with file.open("r+b") as stream:
        stream.seek(begin)
        stream.write(bytes(min(BLOCK_BYTES, size - begin) or BLOCK_BYTES))


def remove_file(file: Path, _: random.Random) -> None:
    """Remove it."""
    file.unlink()


def folder_in_place(file: Path, _: random.Random) -> None:
    """Put an empty folder in its place."""
    file.unlink()
    file.mkdir()


def fifo_in_place(file: Path, _: random.Random) -> None:
    """Put a pipe in its place, which a careless reader waits for forever."""
    file.unlink()
    os.mkfifo(file)


def dangling_link_in_place(file: Path, _: random.Random) -> None:
    """Put a link to nothing in its place."""
    file.unlink()
    file.symlink_to("/nonexistent/target")


FILE_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip-bit": flip_bit,
    "truncate": truncate,
    "empty": empty,
    "append": append,
    "zero-block": zero_block,
    "remove": remove_file,
    "folder-in-place": folder_in_place,
    "fifo-in-place": fifo_in_place,
    "dangling-link-in-place": dangling_link_in_place,
}
RANDOM = ("flip-bit", "truncate", "append", "zero-block")  # kinds that differ from seed to seed


def _link_outside(copy: Path, name: str) -> None:
    """Move a file to a place outside the copy, and put a link to it in its place: the contents are the same."""
    outside = copy.with_name(f"{copy.name}.outside") / name
    outside.parent.mkdir(parents=True, exist_ok=True)
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside.absolute())


def _swap(first: Path, second: Path) -> None:
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def _replace_by(path: Path, source: Path) -> None:
    """Put a copy of the file or folder `source` in place of `path`."""
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)


def remove_folder(folder: Path) -> None:
    """Remove the folder with all files."""
    shutil.rmtree(folder)


def empty_folder(folder: Path) -> None:
    """Remove all files, and keep the folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def file_in_place(folder: Path) -> None:
    """Put an empty file in place of the folder."""
    shutil.rmtree(folder)
    folder.touch()


def stray_file(folder: Path) -> None:
    """Add a file of another program."""
    (folder / "stray.tmp").write_bytes(b"stray")


def link_in_place_of_folder(folder: Path) -> None:
    """Move the folder away, and put a link to it in its place."""
    outside = folder.parent / f"{folder.name}.outside"
    folder.rename(outside)
    folder.symlink_to(outside.absolute(), target_is_directory=True)


FOLDER_DAMAGES: dict[str, Callable[[Path], None]] = {
    "remove-folder": remove_folder,
    "empty-folder": empty_folder,
    "file-in-place-of-folder": file_in_place,
    "stray-file-in": stray_file,
    "link-in-place-of-folder": link_in_place_of_folder,
}
