"""Find what a recipe's source names (file, folder, saved or hub dataset) and stream its rows. No torch."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.data.readers import READERS, Line
from lora_cli.data.records import Record
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec, SourceSpec

SUFFIXES = " ".join(READERS)


class DataSource(NamedTuple):
    """One source of a recipe, found but not read yet."""

    spec: SourceSpec  # with the data section's format and columns filled in
    names: tuple[str, ...]  # what messages call its files
    files: tuple[Path, ...]  # whose bytes are the source's content
    readers: tuple[Callable[[], Iterator[Line]], ...]  # one a name
    fingerprint: str = ""  # that `datasets` gives a dataset: its bytes may be in memory only

    @property
    def name(self) -> str:
        """What messages and the ledger call the source."""
        return _named(self.spec)


def train_sources(spec: DataSpec) -> list[DataSource]:
    """The sources of `data.train`."""
    return [find_source(source, splits=("train",)) for source in _specs(spec, spec.train)]


def eval_sources(spec: DataSpec) -> list[DataSource]:
    """The sources of `data.eval`; none where it is a fraction or null."""
    if spec.eval is None or isinstance(spec.eval, float):
        return []
    return [find_source(source, splits=("validation", "test", "train")) for source in _specs(spec, spec.eval)]


def _specs(spec: DataSpec, given: str | list[SourceSpec]) -> list[SourceSpec]:
    sources = [SourceSpec(path=given)] if isinstance(given, str) else given
    return [
        source.model_copy(
            update={"format": source.format or spec.format, "columns": {**spec.columns, **source.columns}}
        )
        for source in sources
    ]


def read_records(source: DataSource) -> Iterator[Record]:
    """Every row of a source in its deterministic order: files sorted by name, rows as they lie."""
    for index, read in enumerate(source.readers):
        line = 0
        for line, row in read():
            yield Record(index, line, row)
        if line == 0:
            raise LoraError(f"{source.names[index]}: holds no rows", hint="leave the file out, or fill it")


def content_hash(source: DataSource) -> str:
    """A hash of the source's bytes; names and places do not count, so a moved file is the same content."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{source.spec.subset} {source.spec.split} {source.fingerprint}\n".encode())
    for path in source.files:
        digest.update(f"{path.suffix}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_source(spec: SourceSpec, *, splits: tuple[str, ...]) -> DataSource:
    """Looks `spec.path` up; `splits` are tried in order where a dataset has several and the recipe names none."""
    path = Path(spec.path).expanduser()
    if path.is_file():
        return _files(spec, [path])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(spec, path, splits)
    if path.is_dir():
        return _files(spec, _folder(path))
    if _looks_local(spec.path):
        raise _missing(path)
    return _hub(spec, splits)


def _files(spec: SourceSpec, paths: list[Path]) -> DataSource:
    for key, given in (("split", spec.split), ("subset", spec.subset)):
        if given is not None:
            raise LoraError(
                f"data: {spec.path} is a file or folder of files, which has no {key} {given!r}",
                hint=f"leave `{key}` out, or name the file of that {key} as the path",
            )
    unknown = [path for path in paths if path.suffix.lower() not in READERS]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise LoraError(f"data: cannot read {unknown[0]}{more}: unknown file type", hint=f"known are {SUFFIXES}")
    if closed := [path for path in paths if not os.access(path, os.R_OK)]:
        raise LoraError(f"data: may not read {closed[0]}", hint="change its permissions")
    readers = tuple(partial(READERS[path.suffix.lower()], path) for path in paths)
    return DataSource(spec, tuple(map(str, paths)), tuple(paths), readers)


def _folder(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    visible = [path for path in found if path not in hidden]
    if not visible:
        raise LoraError(f"data: the folder {folder} holds no data files", hint=f"known are {SUFFIXES}")
    return visible


def _looks_local(path: str) -> bool:
    return (
        path.startswith(("/", "./", "../", "~"))
        or "\\" in path
        or path.count("/") > 1  # a hub id is owner/name, or a bare name
        or re.search(r"\.[A-Za-z]\w*$", path) is not None
        or ("/" in path and Path(path).parent.is_dir())
    )


def _missing(path: Path) -> LoraError:
    parent = path.parent
    if not parent.is_dir():
        return LoraError(f"data: {path} does not exist: there is no folder {parent}", hint="mend the path")
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1)
    known = [name for name in names if Path(name).suffix.lower() in READERS]
    if close:
        hint = f"did you mean {parent / close[0]}?"
    elif known:
        hint = f"{parent} holds {', '.join(known[:5])}"
    else:
        hint = f"{parent} holds no data files ({SUFFIXES})"
    return LoraError(f"data: {path} does not exist", hint=hint)


def _saved(spec: SourceSpec, path: Path, splits: tuple[str, ...]) -> DataSource:
    import datasets  # two seconds of import, for this kind of source only

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise LoraError(
            f"data: {path} is not a whole dataset folder: {_first_line(error)}",
            hint="save it again with datasets' save_to_disk",
        ) from None
    return _dataset(spec, loaded, splits)


def _hub(spec: SourceSpec, splits: tuple[str, ...]) -> DataSource:
    import datasets

    try:
        loaded = datasets.load_dataset(spec.path, spec.subset, split=spec.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise LoraError(
            f"data: {spec.path} is no local file or folder, and no dataset that the hub gives: {_first_line(error)}",
            hint="name one of its configurations as `subset`"
            if "Config name is missing" in str(error)
            else "mend the path or id; offline (HF_HUB_OFFLINE), only datasets downloaded before can be used",
        ) from None
    return _one(spec, loaded) if spec.split else _dataset(spec, loaded, splits)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _dataset(spec: SourceSpec, loaded: Any, splits: tuple[str, ...]) -> DataSource:
    if isinstance(loaded, dict):
        split = spec.split or next((name for name in splits if name in loaded), None)
        if split not in loaded:
            wanted = f"no split {spec.split!r}" if spec.split else f"no split {' or '.join(splits)}"
            raise LoraError(
                f"data: {spec.path} has {wanted}", hint=f"its splits are {', '.join(loaded)}: name one as `split`"
            )
        spec, loaded = spec.model_copy(update={"split": split}), loaded[split]
    elif spec.split is not None:
        raise LoraError(f"data: {spec.path} is a dataset without splits", hint="leave `split` out")
    return _one(spec, loaded)


def _one(spec: SourceSpec, dataset: Any) -> DataSource:
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    return DataSource(spec, (_named(spec),), files, (partial(_dataset_rows, dataset),), dataset._fingerprint)


def _named(spec: SourceSpec) -> str:
    parts = [part for part in (spec.subset, spec.split) if part is not None]
    return f"{spec.path}[{', '.join(parts)}]" if parts else spec.path


def _dataset_rows(dataset: Any) -> Iterator[Line]:
    number = 0
    classes = {column: names for column, feature in dataset.features.items() if (names := _class_names(feature))}
    # As Arrow, so that image or audio columns nobody asked for are not decoded.
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for row in table.to_pylist():
            number += 1
            yield number, {**row, **{column: _spelled(row[column], names) for column, names in classes.items()}}


def _class_names(feature: Any) -> list[str] | None:
    """The names behind numbered classes, which `datasets` keeps beside the numbers."""
    inner = getattr(feature, "feature", feature)  # of a list of them
    names: list[str] | None = getattr(inner, "names", None)
    return names


def _spelled(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_spelled(each, names) for each in value]
    # -1 stands for a row without label, as in test splits: it is refused, or skipped, as the number that it is.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
