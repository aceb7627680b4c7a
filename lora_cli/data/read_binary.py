"""Read Parquet files and saved datasets row by row, in a child process with limits. No tokenizer, no torch.

Their readers are libraries in C++. A damaged or hostile file can make them crash, loop, or fill the memory: a few bytes
can stand for a billion rows, and a wrong offset for the memory of the process. The child ends then, and the file is
refused. It costs no time: the child decodes the next rows while this process uses the last ones.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.data_file import DataFile
from lora_cli.data.records import BadRow, Line
from lora_cli.errors import LoraError, first_line
from lora_cli.run.child_process import ChildProcess, Ended, Limits

LIMITS = Limits(cpu_s=60.0, memory=4 << 30)  # for a batch of rows
ROWS_PER_BATCH = 1024
BATCH_BYTES = 1 << 26  # batches of long rows have fewer rows
# Columns that are the same in all rows take almost no bytes; rows of which all columns are so are no data.
MAX_ROWS_PER_BYTE = 8
# What pyarrow and `datasets` raise on damaged files, beside pyarrow.ArrowException.
LIBRARY_ERRORS = (OSError, ValueError, LookupError, TypeError, ArithmeticError, NotImplementedError, SystemError)
DAMAGED_HINT = "write the file again, or get it again from its origin"


def read_parquet(file: DataFile) -> Iterator[Line]:
    """Yield the rows of a Parquet file, numbered from 1.

    Raises:
        LoraError: the file cannot be read, or has two columns of the same name.
    """
    return _lines_of_child(f"{file.name}: not a readable Parquet file", _parquet_lines, file.path, file.name)


def read_dataset(dataset: Any, name: str) -> Iterator[Line]:
    """Yield the rows of a split of the library `datasets`, numbered from 1; the name of a class in place of its number.

    Raises:
        LoraError: its files are damaged, or it has two columns of the same name.
    """
    return _lines_of_child(f"data: {name} cannot be read", _dataset_lines, dataset, name)


def try_saved_dataset(folder: Path) -> str | None:
    """Load a saved dataset in a child process; return why it cannot be loaded, None if it can."""
    child = ChildProcess(LIMITS)
    try:
        return child.call(_problem_of_saved_dataset, folder)
    except Ended as ended:
        return f"loading it {ended.detail}"
    finally:
        child.close()


def _problem_of_saved_dataset(folder: Path) -> str | None:
    import datasets
    import pyarrow

    try:
        datasets.load_from_disk(str(folder))
    except (pyarrow.ArrowException, *LIBRARY_ERRORS, AttributeError, RuntimeError) as error:
        return first_line(error)
    return None


def _lines_of_child(problem: str, read: Callable[..., Iterator[list[Line]]], *arguments: Any) -> Iterator[Line]:
    child = ChildProcess(LIMITS)
    try:
        for lines in child.stream(read, *arguments):
            yield from lines
    except Ended as ended:
        raise LoraError(f"{problem}: reading it {ended.detail}", hint=DAMAGED_HINT) from None
    finally:
        child.close()


def _parquet_lines(path: Path, name: str) -> Iterator[list[Line]]:
    # Imported here because pyarrow takes half a second to import, and most data is JSON.
    import pyarrow
    from pyarrow import parquet

    from lora_cli.data.arrow_rows import ArrowRows

    try:
        # With a buffer, because a column of a row group is read whole without one.
        table = parquet.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
        rows = ArrowRows(table.schema_arrow, name)
        count, size = table.metadata.num_rows, path.stat().st_size
        if count > MAX_ROWS_PER_BYTE * size:
            raise LoraError(f"{name}: says that it has {count:,} rows in {size:,} bytes", hint=DAMAGED_HINT)
        number = 0
        # Without threads: the time limit is that of all threads together.
        for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), use_threads=False):
            lines = []
            for row, nulls in rows.of_batch(batch):
                number += 1
                lines.append(Line(number, row, nulls))
            yield lines
        if number != count:
            raise LoraError(f"{name}: has {number:,} of the {count:,} rows that it names", hint=DAMAGED_HINT)
    except (pyarrow.ArrowException, *LIBRARY_ERRORS) as error:
        raise LoraError(f"{name}: not a readable Parquet file: {first_line(error)}", hint=DAMAGED_HINT) from None


def _batch_rows(metadata: Any) -> int:
    """Return the rows of a batch of `BATCH_BYTES`, as the metadata of a Parquet file tells their sizes."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    bytes_per_row = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(ROWS_PER_BATCH, int(BATCH_BYTES / max(1, bytes_per_row))))


def _dataset_lines(dataset: Any, name: str) -> Iterator[list[Line]]:
    import pyarrow

    from lora_cli.data.arrow_rows import ArrowRows

    classes = {column: names for column, feature in dataset.features.items() if (names := _class_names(feature))}
    number = 0
    try:
        rows = ArrowRows(dataset.features.arrow_schema, name)
        # In Arrow format, because other formats decode image and audio columns, which are not needed.
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
            _check_offsets(table)
            lines = []
            for row, nulls in rows.of_batch(table):
                number += 1
                if not isinstance(row, BadRow):
                    row.update({column: _label_names(row[column], names) for column, names in classes.items()})
                lines.append(Line(number, row, nulls))
            yield lines
    except (pyarrow.ArrowException, *LIBRARY_ERRORS) as error:
        raise LoraError(f"data: {name} cannot be read: {first_line(error)}", hint=DAMAGED_HINT) from None


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


def _check_offsets(table: Any) -> None:
    """Check that the values of each column are within the file: the library does not when it returns them.

    Raises:
        pyarrow.ArrowInvalid: some are not.
    """
    import pyarrow

    for column in table.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):  # a row of its own: see `arrow_rows`
                raise
