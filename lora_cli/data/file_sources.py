"""Find the data files of a path in a recipe: a file, a folder, a glob (DIR/*.jsonl) or a URL. No torch."""

import difflib
import glob
import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora_cli.data import remote
from lora_cli.data.data_file import COMPRESSIONS, DataFile, data_file
from lora_cli.data.file_types import READERS, SUPPORTED, WITH_DELIMITER, is_readable
from lora_cli.data.split_names import check_shards, files_of_split, group_by_split, select_split
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import SourceSpec
from lora_cli.run.hub import HUB_ID_HINT, is_hub_id
from lora_cli.run.read_file import MAX_SHOWN, describe_kind, shorten_path

MAX_LISTED = 5  # files listed in a message
MAX_ENTRIES = 50_000  # files of a folder: it is no dataset, but a home folder, or the root

# Files beside the data of a dataset, which contain no rows.
NO_ROWS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|authors|requirements)(\.txt)?|licen[cs]e-\w+"
    r"|dataset_infos?\.json|sha\d+sums?(\.txt)?|md5sums?(\.txt)?|thumbs\.db|desktop\.ini"
    r"|_success|_(common_)?metadata|_(committed|started)_\d+"  # of Spark
    r"|.*\.(md|rst|pdf|html?|py|ipynb|sh|ya?ml|toml|cff|bib|lock|sha256|md5|crc)",
    re.IGNORECASE,
)


class FileSet(NamedTuple):
    """The data files of a source."""

    files: tuple[DataFile, ...]
    split: str | None = None  # of a folder or glob whose file names tell splits


class _Listed(NamedTuple):
    """A file of a folder or glob, local or remote."""

    within: str  # path within the folder
    name: str  # in messages
    fetch: Callable[[], Path]  # returns its path, downloaded if it is remote


def find_files(spec: SourceSpec, *, splits: Sequence[str], cache: Path, info: Callable[[str], None]) -> FileSet | None:
    """Return the data files of `spec.path`, None if it is no file, folder, glob or URL.

    Args:
        spec: the source.
        splits: which split to read of a folder or glob with several, in the order of preference.
        cache: folder for downloads.
        info: prints which files are not read.

    Raises:
        LoraError: there is no such file, it has an unknown type, or the split cannot be told.
    """
    path = Path(os.path.expanduser(spec.path))
    if remote.is_url(spec.path):
        found = remote.find_url(spec.path)
        listed = [
            _Listed(file.within, file.name, lambda file=file: remote.download(file, cache, info))  # type: ignore[misc]
            for file in found.files
        ]
        single, folder = found.single, not found.glob
    elif path.is_file():
        listed, single, folder = [_local(path, path.parent)], True, False
    elif path.is_dir():
        listed = [_local(file, path) for file in _files(_walk(path))]
        single, folder = False, True
    elif glob.has_magic(str(path)):
        listed, single, folder = _glob(path), False, False
    elif os.path.lexists(path):
        raise _not_a_file(path)
    else:
        return None
    if spec.subset is not None:
        raise _no_such_part(spec, "subset", spec.subset)
    if single:
        if spec.split is not None:
            raise _no_such_part(spec, "split", spec.split)
        return FileSet((_to_data_file(listed[0], spec),))
    listed = _without_other_files(spec.path, listed, info)
    names = [item.within for item in listed]
    split = select_split(spec.path, names, split=spec.split, default=splits)
    chosen = files_of_split(names, split, named=spec.split is not None)
    if folder:
        check_shards(spec.path, chosen)
    _check_twins(spec.path, chosen)
    groups = group_by_split(chosen)
    if len(groups) > 1 and None in groups:
        info(f"{spec.path}: read as {split} too, as their names tell no split: {_some(groups[None])}")
    if len(chosen) < len(names):
        others = [name for name in names if name not in set(chosen)]
        info(f"{spec.path}: {_count(len(chosen))} of split {split} by name; not read: {_some(others)}")
    selected = [item for item in listed if item.within in set(chosen)]
    _check_types(selected)
    return FileSet(tuple(_to_data_file(item, spec) for item in selected), split)


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _local(path: Path, root: Path) -> _Listed:
    return _Listed(path.relative_to(root).as_posix(), str(path), lambda: path)


def _files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of some paths, and hidden folders, which are told as not read; other folders are left out.

    Raises:
        LoraError: one is a link to nothing, a pipe or a device: its rows would be missing silently.
    """
    files = [path for path in paths if path.is_file() or (_is_hidden(path.name) and path.is_dir())]
    others = (path for path in paths if not path.is_dir() and not path.is_file())
    for path in others:
        if not _is_hidden(path.name):  # editors make links as locks
            raise _not_a_file(path)
    return files


def _walk(folder: Path) -> list[Path]:
    """Return what is in `folder` and the folders below it, sorted; of a hidden folder, the folder alone.

    Raises:
        LoraError: that is more than a dataset has, or a folder cannot be read.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        place = os.fsdecode(error.filename)
        raise LoraError(
            f"data: the folder {place} cannot be read: {error.strerror}",
            hint="check its permissions, or name the folder of the rows alone",
        )

    for place, folders, files in os.walk(folder, onerror=refuse):
        hidden = [name for name in folders if name.startswith(".")]
        found += [Path(place, name) for name in (*hidden, *files)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        if len(found) + len(folders) > MAX_ENTRIES:
            raise _too_many(f"the folder {folder} has")
    return sorted(found)


def _too_many(what: str) -> LoraError:
    return LoraError(f"data: {what} more than {MAX_ENTRIES:,} files", hint="name the folder of the rows alone")


def _not_a_file(path: Path) -> LoraError:
    return LoraError(f"data: {path} is {describe_kind(path)}, not a file", hint="write the path of a file or folder")


def _glob(pattern: Path) -> list[_Listed]:
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    if "**" in parts and os.path.isdir(root):
        _walk(root)  # which tells that there are too many
    matches = sorted(map(Path, islice(glob.iglob(str(pattern), recursive=True), MAX_ENTRIES + 1)))
    if len(matches) > MAX_ENTRIES:
        raise _too_many(f"{pattern} matches")
    files = _files(matches)
    if not files:
        found = "matches only folders" if matches else "matches no file"
        hint = f"write {pattern}/** for the files in them" if matches else "correct the pattern; ** matches folders"
        raise LoraError(f"data: {pattern} {found}", hint=hint)
    return [_local(path, root) for path in files]


def _no_such_part(spec: SourceSpec, key: str, value: str) -> LoraError:
    return LoraError(
        f"data: {spec.path} is a file or folder of files, which has no {key} {value!r}",
        hint=f"remove `{key}`, or set the path to the file of that {key}",
    )


def _without_other_files(where: str, listed: list[_Listed], info: Callable[[str], None]) -> list[_Listed]:
    """Leave out the files that contain no rows, and tell them."""
    others = [item for item in listed if NO_ROWS.fullmatch(PurePosixPath(item.within).name) or _is_hidden(item.within)]
    data = [item for item in listed if item not in others]
    if not data:
        raise LoraError(f"data: the folder {where} contains no data files", hint=f"supported file types: {SUPPORTED}")
    if others:
        info(f"{where}: not read, as they contain no rows: {_some([item.within for item in others])}")
    return data


def _is_hidden(within: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(within).parts)


def _check_twins(where: str, names: Sequence[str]) -> None:
    """Raise if a file is there both plain and compressed: its rows would be read twice."""
    plain: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        stem = str(path.with_suffix("")) if path.suffix.lower() in COMPRESSIONS else name
        if stem in plain:
            raise LoraError(
                f"data: {where} contains {plain[stem]} and {name}, the same file twice", hint="remove one of them"
            )
        plain[stem] = name


def _check_types(listed: Sequence[_Listed]) -> None:
    """Raise for files of unknown types, all at once, before any of them is downloaded."""
    suffixes = {item.name: [suffix.lower() for suffix in PurePosixPath(item.within).suffixes] for item in listed}
    known = {*READERS, ".zip"}
    unknown = [
        name
        for name, found in suffixes.items()
        if not found
        or (found[-1] not in known and not (found[-1] in COMPRESSIONS and set(found[-2:-1]) & set(READERS)))
    ]
    if unknown:
        raise _unknown_type(unknown)


def _unknown_type(names: Sequence[str]) -> LoraError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return LoraError(
        f"data: cannot read {names[0]}{more}: unknown file type", hint=f"supported file types: {SUPPORTED}"
    )


def _to_data_file(item: _Listed, spec: SourceSpec) -> DataFile:
    _check_types([item])
    path = item.fetch()
    if not os.access(path, os.R_OK):
        raise LoraError(f"data: no permission to read {item.name}", hint="change its permissions")
    file = data_file(path, item.name, delimiter=spec.delimiter)
    if not is_readable(file):
        raise _unknown_type([item.name])
    if spec.delimiter is not None and file.suffix not in WITH_DELIMITER:
        raise LoraError(
            f"data: {item.name} is not a file of cells, which has no delimiter {spec.delimiter!r}",
            hint=f"remove `delimiter`; it is for {' and '.join(sorted(WITH_DELIMITER))} files",
        )
    return file


def check_local_path(text: str) -> None:
    """Check that a path on this machine is there; URLs, and names that can be those of hub datasets, are not checked.

    Raises:
        LoraError: there is no such file or folder, or a pattern matches none.
    """
    path = Path(os.path.expanduser(text))
    if remote.is_url(text) or os.path.lexists(path):
        return
    if glob.has_magic(str(path)):
        _glob(path)
    elif looks_local(text):
        raise missing_path_error(path)
    else:
        check_dataset_id(text)


def check_dataset_id(text: str) -> None:
    """Check that what is no path on this machine has the form of the id of a hub dataset.

    Raises:
        LoraError: it has not.
    """
    if not is_hub_id(text):
        shown = shorten_path(Path(text)) if len(text) > MAX_SHOWN else text
        raise LoraError(f"data: {shown} is not a file or folder, and cannot be a hub id", hint=HUB_ID_HINT)


def looks_local(path: str) -> bool:
    """Return whether a path that does not exist was meant as a local path, not as the id of a hub dataset."""
    return (
        path.startswith(("/", "./", "../", "~"))
        or "\\" in path
        or path.count("/") > 1  # a hub id is owner/name, or a name without owner
        or re.search(r"\.[A-Za-z]\w*$", path) is not None
        or ("/" in path and Path(path).parent.is_dir())
    )


def missing_path_error(path: Path) -> LoraError:
    """Return the error for a local path that does not exist."""
    parent = path.parent
    if not parent.is_dir():
        return LoraError(f"data: {path} does not exist: there is no folder {parent}", hint="correct the path")
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1)
    known = [name for name in names if {suffix.lower() for suffix in Path(name).suffixes} & {*READERS, ".zip"}]
    if close:
        hint = f"did you mean {parent / close[0]}?"
    elif known:
        hint = f"{parent} contains {', '.join(known[:5])}"
    else:
        hint = f"{parent} contains no data files ({' '.join(READERS)})"
    return LoraError(f"data: {path} does not exist", hint=hint)
