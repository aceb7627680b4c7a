"""Rows of Arrow tables (Parquet files, saved and hub datasets) as JSON values; nulls in structs are dropped. No torch.

Rows of a table share the fields of a struct, so that Arrow fills the fields that a row does not have with null. These
nulls cannot be told from those that an author wrote: both are dropped and reported. Nulls in text that contains JSON
(string columns, the `Json` type of `datasets`), in lists and in maps are the author's, and kept.
"""

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from lora_cli.data.readers import parse_json_field
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError

# Converts a value that is not None; adds the path of every null that it drops to the list.
Convert = Callable[[Any, list[str]], Any]


class ArrowRows:
    """Converts the record batches of a table; the conversion of its columns is derived from their types once."""

    def __init__(self, schema: pa.Schema, name: str) -> None:
        """`name` is the name of the table in messages.

        Raises:
            LoraError: two columns have the same name.
        """
        if repeated := [column for column in schema.names if schema.names.count(column) > 1]:
            raise LoraError(f"{name}: the column {repeated[0]!r} occurs twice", hint="rename one of them")
        converters = {field.name: _converter(field.type, field.name, nested=False) for field in schema}
        self._converters = {column: convert for column, convert in converters.items() if convert is not None}

    def of_batch(self, batch: pa.RecordBatch | pa.Table) -> Iterator[tuple[dict[str, Any] | BadRow, Sequence[str]]]:
        """Yield every row, and the paths of the nulls that were dropped: `messages[].tool_calls`.

        The value of a column that JSON cannot represent is a BadRow, as the column may be one that is not used.
        """
        for row in _python_rows(batch):
            if isinstance(row, BadRow):
                yield row, ()
                continue
            nulls: list[str] = []
            for column, convert in self._converters.items():
                value = row[column]
                if value is not None:
                    try:
                        row[column] = convert(value, nulls)
                    except BadRow as bad:
                        row[column] = bad
            yield row, nulls


def _python_rows(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | BadRow]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # by one of the rows; UnicodeDecodeError is a ValueError
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRow("not UTF-8", f"is not UTF-8: byte 0x{error.object[error.start]:02x} of a text")
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield BadRow("unreadable value", f"cannot be read: {str(error).splitlines()[0]}")


def _converter(type_: pa.DataType, path: str, *, nested: bool) -> Convert | None:
    """Return the conversion of a type's values to JSON values; None if they are JSON values.

    Args:
        type_: the type.
        path: of the values, for messages.
        nested: whether the values are in a struct or map, where they become part of JSON text.
    """
    if isinstance(type_, pa.BaseExtensionType):
        return _extension(type_, path, nested=nested)
    if types.is_struct(type_):
        return _struct(type_, path)
    if types.is_map(type_):
        return _map(type_, path)
    if types.is_dictionary(type_) or types.is_run_end_encoded(type_):
        return _converter(type_.value_type, path, nested=nested)
    if _is_list(type_):
        return _list(type_, path, nested=nested)
    if types.is_boolean(type_) or types.is_integer(type_) or types.is_null(type_) or _is_string(type_):
        return None
    if types.is_floating(type_):
        return _float(path, shortest=nested and not types.is_float64(type_))
    simple = next((convert for matches, convert in SIMPLE if matches(type_)), _unsupported)
    return lambda value, _: simple(value, path)


def _is_list(type_: pa.DataType) -> bool:
    checks = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(check(type_) for check in checks)


def _is_string(type_: pa.DataType) -> bool:
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def _struct(type_: pa.StructType, path: str) -> Convert:
    fields = [(field.name, f"{path}.{field.name}") for field in type_]
    converted = [(name, _converter(type_.field(name).type, inner, nested=True), inner) for name, inner in fields]

    def convert(value: dict[str, Any], nulls: list[str]) -> dict[str, Any]:
        result = {}
        for name, convert_field, inner in converted:
            item = value[name]
            if item is None:
                nulls.append(inner)
            else:
                result[name] = convert_field(item, nulls) if convert_field else item
        return result

    return convert


def _map(type_: pa.MapType, path: str) -> Convert:
    convert_item = _converter(type_.item_type, f"{path}.*", nested=True)

    def convert(pairs: list[tuple[Any, Any]], nulls: list[str]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in pairs:
            if not isinstance(key, str):
                raise BadRow("not a JSON value", f"a key is {key!r}, not a string", field=path)
            if key in result:
                raise BadRow("repeated key", f"the key {key!r} occurs twice", field=path)
            result[key] = convert_item(item, nulls) if convert_item and item is not None else item
        return result

    return convert


def _list(type_: Any, path: str, *, nested: bool) -> Convert | None:
    convert_item = _converter(type_.value_type, f"{path}[]", nested=nested)
    if convert_item is None:
        return None
    return lambda items, nulls: [None if item is None else convert_item(item, nulls) for item in items]


def _extension(type_: Any, path: str, *, nested: bool) -> Convert | None:
    if type_.extension_name == "arrow.json":
        return lambda value, _: parse_json_field(value, field=path)
    if type_.extension_name in ("arrow.uuid", "arrow.bool8"):
        return lambda value, _: str(value) if isinstance(value, uuid.UUID) else value
    convert = _converter(type_.storage_type, path, nested=nested)
    # `datasets` returns its arrays of several dimensions as NumPy arrays.
    return lambda value, nulls: _apply(convert, value.tolist() if isinstance(value, np.ndarray) else value, nulls)


def _apply(convert: Convert | None, value: Any, nulls: list[str]) -> Any:
    return convert(value, nulls) if convert else value


def _float(path: str, *, shortest: bool) -> Convert:
    def convert(value: float, _: list[str]) -> float:
        if not math.isfinite(value):
            raise BadRow("NaN or infinity", f"is {value}, which is not a JSON value", field=path)
        # The shortest decimals of a float32, as its author wrote it: 0.1, not 0.10000000149011612.
        return float(str(np.float32(value))) if shortest else value

    return convert


def _from_decimal(value: Decimal, path: str) -> float:
    number = int(value) if value == value.to_integral_value() else float(value)
    if Decimal(repr(number)) != value:
        raise BadRow("not a JSON value", f"is {value}, which has more digits than a number in JSON", field=path)
    return number


def _from_bytes(value: bytes, path: str) -> str:
    # Some programs write texts as binary columns.
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRow("not UTF-8", f"is {len(value):,} bytes of binary data, not text", field=path) from None


def _from_time(value: Any, path: str) -> str:
    """Return a date or time in ISO 8601."""
    return str(value.isoformat())


def _unsupported(value: object, path: str) -> object:
    raise BadRow("not a JSON value", f"is a {type(value).__name__}, which is not a JSON value", field=path)


# Types whose values are converted one by one: a test of the type, the conversion.
SIMPLE: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any, str], Any]], ...] = (
    (types.is_decimal, _from_decimal),
    (lambda t: types.is_timestamp(t) or types.is_date(t) or types.is_time(t), _from_time),
    (lambda t: types.is_binary(t) or types.is_large_binary(t) or types.is_fixed_size_binary(t), _from_bytes),
    (types.is_binary_view, _from_bytes),
)
