"""Open the dataset sources of a recipe (files, folder, URL, saved or hub dataset) and stream their rows. No torch."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lora_cli.data.data_file import REGULAR_HINT, DataFile
from lora_cli.data.file_sources import FileSet, check_dataset_id, find_files, looks_local, missing_path_error
from lora_cli.data.file_types import READERS
from lora_cli.data.read_binary import read_dataset, try_saved_dataset
from lora_cli.data.records import Line, Record
from lora_cli.errors import LoraError, first_line
from lora_cli.recipe.schema import DataSpec, SourceSpec
from lora_cli.run.cache_folder import cache_folder
from lora_cli.run.console import no_output
from lora_cli.run.hub import USING_CACHE, ask_hub, no_answer_error
from lora_cli.run.read_file import open_regular

Info = Callable[[str], None]


class DataSource(NamedTuple):
    """One dataset source of a recipe, located but not read yet."""

    spec: SourceSpec  # with the data section's format and columns filled in
    names: tuple[str, ...]  # names of its files in messages
    files: tuple[Path, ...]  # files that contain its data
    readers: tuple[Callable[[], Iterator[Line]], ...]  # one for each name
    types: tuple[str, ...] = ()  # of each file: how its bytes are read
    fingerprint: str = ""  # the fingerprint of `datasets`, for datasets whose data may be in memory only

    @property
    def name(self) -> str:
        """Name of the source in messages and in the ledger."""
        return _display_name(self.spec)


def train_sources(spec: DataSpec, *, cache: Path | None = None, info: Info = no_output) -> list[DataSource]:
    """Return the sources of `data.train`.

    Args:
        spec: the recipe's data section.
        cache: folder for downloads; None for the user's cache folder.
        info: prints which files of a folder are not read, and the progress of downloads.

    Raises:
        LoraError: a source does not exist or cannot be read, or two sources read the same file.
    """
    sources = [find_source(source, splits=("train",), cache=cache, info=info) for source in _specs(spec, spec.train)]
    for number, source in enumerate(sources):
        for other in sources[:number]:
            # The same file read in another way gives other rows.
            if _way_of_reading(other.spec) == _way_of_reading(source.spec):
                _check_no_common_file(other, source, f"data.train: {source.spec.path} and {other.spec.path} both read")
    return sources


def eval_sources(
    spec: DataSpec, train: Sequence[DataSource] = (), *, cache: Path | None = None, info: Info = no_output
) -> list[DataSource]:
    """Return the sources of `data.eval`: an empty list if it is a fraction or null.

    `train` are the sources of `data.train`; the other arguments are those of `train_sources`.

    Raises:
        LoraError: a source does not exist or cannot be read, or reads a file of `train`.
    """
    if spec.eval is None or isinstance(spec.eval, float):
        return []
    splits = ("validation", "test", "train")
    sources = [find_source(source, splits=splits, cache=cache, info=info) for source in _specs(spec, spec.eval)]
    for source in sources:
        for other in train:
            _check_no_common_file(other, source, f"data.eval: {source.spec.path} reads a file of data.train:")
    return sources


def _way_of_reading(spec: SourceSpec) -> tuple[object, ...]:
    return spec.format, spec.columns, spec.message_fields, spec.roles, spec.template_variables


def _check_no_common_file(one: DataSource, other: DataSource, problem: str) -> None:
    if one.fingerprint or other.fingerprint:
        return  # splits of a saved dataset can share files
    resolved = {path.resolve(): name for path, name in zip(one.files, one.names, strict=True)}
    common = [resolved[path.resolve()] for path in other.files if path.resolve() in resolved]
    if common:
        more = f" and {len(common) - 1} more" if len(common) > 1 else ""
        raise LoraError(f"{problem} {common[0]}{more}", hint="write paths or splits of different rows")


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
    """Yield the rows of a source in a deterministic order: files sorted by name, rows in file order.

    With `max_rows`, only the first ones.

    Raises:
        LoraError: a file contains no rows or cannot be read.
    """
    return islice(_all_records(source), source.spec.max_rows)


def _all_records(source: DataSource) -> Iterator[Record]:
    for index, read in enumerate(source.readers):
        line = 0
        for line, row, nulls in read():
            yield Record(index, line, row, nulls)
        if line == 0:
            raise LoraError(f"{source.names[index]}: contains no rows", hint="leave the file out, or add rows")


def content_hash(source: DataSource) -> str:
    """Return a hash of the source's bytes; names and locations are not included, so that a file can be moved."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{source.spec.subset} {source.spec.split} {source.fingerprint}\n".encode())
    for path, type_ in zip(source.files, source.types or [path.suffix for path in source.files], strict=True):
        digest.update(f"{type_}:{path.stat().st_size}\n".encode())
        with open_regular(path, hint=REGULAR_HINT) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_source(
    spec: SourceSpec, *, splits: tuple[str, ...], cache: Path | None = None, info: Info = no_output
) -> DataSource:
    """Locate `spec.path`; if the recipe does not set the split of a dataset, use the first of `splits` that exists.

    Raises:
        LoraError: the source does not exist, has an unknown file type, or lacks the requested split.
    """
    path = Path(os.path.expanduser(spec.path))
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not is_saved and (found := find_files(spec, splits=splits, cache=cache or cache_folder(), info=info)):
        return _from_files(spec, found)
    if spec.delimiter is not None:
        raise LoraError(
            f"data: {spec.path} is not a file of cells, which has no delimiter {spec.delimiter!r}",
            hint="remove `delimiter`",
        )
    if is_saved:
        return _from_disk(spec, path, splits)
    if looks_local(spec.path):
        raise missing_path_error(path)
    return _from_hub(spec, splits, info)


def _from_files(spec: SourceSpec, found: FileSet) -> DataSource:
    return DataSource(
        spec if found.split is None else spec.model_copy(update={"split": found.split}),
        names=tuple(file.name for file in found.files),
        files=tuple(file.path for file in found.files),
        readers=tuple(partial(READERS[file.suffix], file) for file in found.files),
        types=tuple(_type_of(file) for file in found.files),
    )


def _type_of(file: DataFile) -> str:
    # Plain files without delimiter as earlier versions hashed them, so that their runs can be resumed.
    plain = PurePosixPath(file.name).suffix if not file.compression else file.suffix + file.compression
    return f"{plain}{file.delimiter or ''}"


def _from_disk(spec: SourceSpec, path: Path, splits: tuple[str, ...]) -> DataSource:
    if problem := try_saved_dataset(path):
        raise LoraError(
            f"data: {path} is not a complete dataset folder: {problem}",
            hint="save it again with datasets' save_to_disk",
        )
    import datasets  # imported here because it takes two seconds and only this kind of source needs it

    return _select_split(spec, datasets.load_from_disk(str(path)), splits)


def _from_hub(spec: SourceSpec, splits: tuple[str, ...], info: Info) -> DataSource:
    check_dataset_id(spec.path)
    problem = ask_hub(info, about=f"api/datasets/{spec.path}")
    import datasets

    try:
        loaded = datasets.load_dataset(spec.path, spec.subset, split=spec.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if problem is not None:
            raise no_answer_error(spec.path, problem, key="data") from None
        raise LoraError(
            f"data: {spec.path} is not a local file or folder, and not an available hub dataset: {first_line(error)}",
            hint="set `subset` to one of its configurations"
            if "Config name is missing" in str(error)
            else "correct the path or id; offline (HF_HUB_OFFLINE), only downloaded datasets are available",
        ) from None
    if problem is not None:
        info(USING_CACHE)
    return _from_dataset(spec, loaded) if spec.split else _select_split(spec, loaded, splits)


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
    readers = (partial(read_dataset, dataset, _display_name(spec)),)
    return DataSource(spec, (_display_name(spec),), files, readers, fingerprint=dataset._fingerprint)


def _display_name(spec: SourceSpec) -> str:
    parts = [part for part in (spec.subset, spec.split) if part is not None]
    return f"{spec.path}[{', '.join(parts)}]" if parts else spec.path
