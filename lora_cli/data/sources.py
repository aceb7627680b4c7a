"""Open the dataset sources of a recipe (file, folder, saved dataset, hub dataset) and stream their rows. No torch."""

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
    """One dataset source of a recipe, located but not read yet."""

    spec: SourceSpec  # with the data section's format and columns filled in
    names: tuple[str, ...]  # names of its files in messages
    files: tuple[Path, ...]  # files that contain its data
    readers: tuple[Callable[[], Iterator[Line]], ...]  # one for each name
    fingerprint: str = ""  # the fingerprint of `datasets`, for datasets whose data may be in memory only

    @property
    def name(self) -> str:
        """Name of the source in messages and in the ledger."""
        return _display_name(self.spec)


def train_sources(spec: DataSpec) -> list[DataSource]:
    """Return the sources of `data.train`.

    Raises:
        LoraError: a source does not exist or cannot be read.
    """
    return [find_source(source, splits=("train",)) for source in _specs(spec, spec.train)]


def eval_sources(spec: DataSpec) -> list[DataSource]:
    """Return the sources of `data.eval`: an empty list if it is a fraction or null.

    Raises:
        LoraError: a source does not exist or cannot be read.
    """
    if spec.eval is None or isinstance(spec.eval, float):
        return []
    return [find_source(source, splits=("validation", "test", "train")) for source in _specs(spec, spec.eval)]


def _specs(spec: DataSpec, paths: str | list[SourceSpec]) -> list[SourceSpec]:
    sources = [SourceSpec(path=paths)] if isinstance(paths, str) else paths
    return [
        source.model_copy(
            update={
                "format": source.format or spec.format,
                "columns": {**spec.columns, **source.columns},
                "message_fields": {**spec.message_fields, **source.message_fields},
                "roles": {**spec.roles, **source.roles},
                "template_variables": {**spec.template_variables, **source.template_variables},
            }
        )
        for source in sources
    ]


def read_records(source: DataSource) -> Iterator[Record]:
    """Yield every row of a source in a deterministic order: files sorted by name, rows in file order.

    Raises:
        LoraError: a file contains no rows or cannot be read.
    """
    for index, read in enumerate(source.readers):
        line = 0
        for line, row in read():
            yield Record(index, line, row)
        if line == 0:
            raise LoraError(f"{source.names[index]}: contains no rows", hint="leave the file out, or add rows")


def content_hash(source: DataSource) -> str:
    """Return a hash of the source's bytes; names and locations are not included, so that a file can be moved."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{source.spec.subset} {source.spec.split} {source.fingerprint}\n".encode())
    for path in source.files:
        digest.update(f"{path.suffix}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_source(spec: SourceSpec, *, splits: tuple[str, ...]) -> DataSource:
    """Locate `spec.path`; if the recipe does not set the split of a dataset, use the first of `splits` that exists.

    Raises:
        LoraError: the source does not exist, has an unknown file type, or lacks the requested split.
    """
    path = Path(spec.path).expanduser()
    if path.is_file():
        return _from_files(spec, [path])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_disk(spec, path, splits)
    if path.is_dir():
        return _from_files(spec, _list_folder(path))
    if _looks_local(spec.path):
        raise _missing_path_error(path)
    return _from_hub(spec, splits)


def _from_files(spec: SourceSpec, paths: list[Path]) -> DataSource:
    for key, value in (("split", spec.split), ("subset", spec.subset)):
        if value is not None:
            raise LoraError(
                f"data: {spec.path} is a file or folder of files, which has no {key} {value!r}",
                hint=f"remove `{key}`, or set the path to the file of that {key}",
            )
    unknown = [path for path in paths if path.suffix.lower() not in READERS]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise LoraError(
            f"data: cannot read {unknown[0]}{more}: unknown file type", hint=f"supported file types: {SUFFIXES}"
        )
    if unreadable := [path for path in paths if not os.access(path, os.R_OK)]:
        raise LoraError(f"data: no permission to read {unreadable[0]}", hint="change its permissions")
    readers = tuple(partial(READERS[path.suffix.lower()], path) for path in paths)
    return DataSource(spec, tuple(map(str, paths)), tuple(paths), readers)


def _list_folder(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = [path for path in files if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    visible = [path for path in files if path not in hidden]
    if not visible:
        raise LoraError(f"data: the folder {folder} contains no data files", hint=f"supported file types: {SUFFIXES}")
    return visible


def _looks_local(path: str) -> bool:
    return (
        path.startswith(("/", "./", "../", "~"))
        or "\\" in path
        or path.count("/") > 1  # a hub id is owner/name, or a name without owner
        or re.search(r"\.[A-Za-z]\w*$", path) is not None
        or ("/" in path and Path(path).parent.is_dir())
    )


def _missing_path_error(path: Path) -> LoraError:
    parent = path.parent
    if not parent.is_dir():
        return LoraError(f"data: {path} does not exist: there is no folder {parent}", hint="correct the path")
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1)
    known = [name for name in names if Path(name).suffix.lower() in READERS]
    if close:
        hint = f"did you mean {parent / close[0]}?"
    elif known:
        hint = f"{parent} contains {', '.join(known[:5])}"
    else:
        hint = f"{parent} contains no data files ({SUFFIXES})"
    return LoraError(f"data: {path} does not exist", hint=hint)


def _from_disk(spec: SourceSpec, path: Path, splits: tuple[str, ...]) -> DataSource:
    import datasets  # imported here because it takes two seconds and only this kind of source needs it

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise LoraError(
            f"data: {path} is not a complete dataset folder: {_first_line(error)}",
            hint="save it again with datasets' save_to_disk",
        ) from None
    return _select_split(spec, loaded, splits)


def _from_hub(spec: SourceSpec, splits: tuple[str, ...]) -> DataSource:
    import datasets

    try:
        loaded = datasets.load_dataset(spec.path, spec.subset, split=spec.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise LoraError(
            f"data: {spec.path} is not a local file or folder, and not an available hub dataset: {_first_line(error)}",
            hint="set `subset` to one of its configurations"
            if "Config name is missing" in str(error)
            else "correct the path or id; offline (HF_HUB_OFFLINE), only downloaded datasets are available",
        ) from None
    return _from_dataset(spec, loaded) if spec.split else _select_split(spec, loaded, splits)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _select_split(spec: SourceSpec, loaded: Any, splits: tuple[str, ...]) -> DataSource:
    if isinstance(loaded, dict):
        split = spec.split or next((name for name in splits if name in loaded), None)
        if split not in loaded:
            missing = repr(spec.split) if spec.split else " or ".join(splits)
            raise LoraError(
                f"data: {spec.path} has no split {missing}", hint=f"set `split` to one of {', '.join(loaded)}"
            )
        spec, loaded = spec.model_copy(update={"split": split}), loaded[split]
    elif spec.split is not None:
        raise LoraError(f"data: {spec.path} is a dataset without splits", hint="remove `split`")
    return _from_dataset(spec, loaded)


def _from_dataset(spec: SourceSpec, dataset: Any) -> DataSource:
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    return DataSource(spec, (_display_name(spec),), files, (partial(_dataset_rows, dataset),), dataset._fingerprint)


def _display_name(spec: SourceSpec) -> str:
    parts = [part for part in (spec.subset, spec.split) if part is not None]
    return f"{spec.path}[{', '.join(parts)}]" if parts else spec.path


def _dataset_rows(dataset: Any) -> Iterator[Line]:
    number = 0
    classes = {column: names for column, feature in dataset.features.items() if (names := _class_names(feature))}
    # In Arrow format, because other formats decode image and audio columns, which are not needed.
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for row in table.to_pylist():
            number += 1
            yield number, {**row, **{column: _label_names(row[column], names) for column, names in classes.items()}}


def _class_names(feature: Any) -> list[str] | None:
    """Return the class names of a `ClassLabel` column, which contains numbers; None for other columns."""
    inner = getattr(feature, "feature", feature)  # `feature.feature` is the type of a list's items
    names: list[str] | None = getattr(inner, "names", None)
    return names


def _label_names(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_label_names(each, names) for each in value]
    # -1 marks a row without label, as in test splits: it is kept as a number, which the row format rejects.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
