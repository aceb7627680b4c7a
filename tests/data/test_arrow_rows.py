"""Rows of Arrow tables: nulls that Arrow fills in are dropped and counted, other values become JSON values."""

import datetime
import json
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_cli.data.arrow_rows import ArrowRows
from lora_cli.data.data_file import data_file
from lora_cli.data.examples import check_rows
from lora_cli.data.read_binary import read_parquet
from lora_cli.data.records import BadRow
from lora_cli.data.sources import read_records, train_sources
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec


def call(name: str, arguments: dict[str, object]) -> dict[str, object]:
    parameters = {"properties": {key: {"type": "any"} for key in arguments}}
    return {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
    }


CALLS = [call("weather", {"city": "Paris"}), call("repeat", {"count": 3}), call("now", {})]


def without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def test_tool_calls_of_a_table_are_those_that_were_written(tmp_path):
    parquet.write_table(pa.Table.from_pylist(CALLS), tmp_path / "x.parquet")
    lines = list(read_parquet(data_file(tmp_path / "x.parquet")))
    assert [line.row for line in lines] == CALLS
    arguments = "messages[].tool_calls[].function.arguments"
    properties = "tools[].function.parameters.properties"
    assert [Counter(line.nulls) for line in lines] == [
        Counter({"messages[].tool_calls": 1, "messages[].content": 1, **dict.fromkeys(missing, 1)})
        for missing in (
            (f"{arguments}.count", f"{properties}.count"),
            (f"{arguments}.city", f"{properties}.city"),
            (f"{arguments}.city", f"{arguments}.count", f"{properties}.city", f"{properties}.count"),
        )
    ]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tool_calls_are_encoded_as_from_json(prepared, chatml, tmp_path, kind):
    import datasets

    rows = [call("weather", {"city": "Paris"}), call("repeat", {"count": 3})]
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain = prepared(
        chatml, files={"x.jsonl": "".join(map(json.dumps, rows[:1]))}, train="x.jsonl", chat_template=template
    )
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "table.parquet"))
    data = prepared(chatml, train="table.parquet", chat_template=template)
    assert data.train[0].input_ids.tolist() == plain.train[0].input_ids.tolist()
    told = [line.strip() for line in data.ledger.table() if "of structs dropped (Arrow fills them in): mess" in line]
    assert len(told) == 1
    # `lora check --no-model` tells the same.
    spec = DataSpec(train="table.parquet", eval=None)
    assert [note for source in check_rows(spec, "causal-lm", print) for note in source.notes] == told
    # In JSON, the author wrote the null.
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["count"] = None
    written = prepared(chatml, files={"x.jsonl": json.dumps(rows[0])}, train="x.jsonl", chat_template=template)
    assert "null" in chatml.decode(written.train[0].input_ids)
    assert written.ledger.entries[0].tally.nulls == {}


def rows_of(type_: pa.DataType, values: list[object]) -> list[object]:
    """Return the values of a column as rows have them, a BadRow as its reason."""
    if isinstance(type_, pa.BaseExtensionType):
        column = pa.ExtensionArray.from_storage(type_, pa.array(values, type_.storage_type))
    else:
        column = pa.array(values, type_)
    table = pa.table({"x": column})
    [*rows] = ArrowRows(table.schema, "x.parquet").of_batch(table)
    found = [row["x"] for row, _ in rows if isinstance(row, dict)]
    return [value.reason if isinstance(value, BadRow) else value for value in found]


MOMENT = datetime.datetime(2024, 5, 17, 9, 30, 1)
TYPES = {
    "timestamp": (pa.timestamp("us"), [MOMENT], ["2024-05-17T09:30:01"]),
    "zone": (pa.timestamp("ms", "UTC"), [MOMENT], ["2024-05-17T09:30:01+00:00"]),
    "date": (pa.date32(), [MOMENT.date()], ["2024-05-17"]),
    "time": (pa.time64("us"), [MOMENT.time()], ["09:30:01"]),
    "duration": (pa.duration("s"), [datetime.timedelta(1)], ["not a JSON value"]),
    "decimal": (pa.decimal128(20, 2), [Decimal("19.99"), Decimal("3.00")], [19.99, 3]),
    "long decimal": (pa.decimal128(38, 2), [Decimal("123456789012345678901.23")], ["not a JSON value"]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"], ["a", "b", "a"]),
    "large string": (pa.large_string(), ["a"], ["a"]),
    "string view": (pa.string_view(), ["a"], ["a"]),
    "text as binary": (pa.binary(), ["é".encode()], ["é"]),
    "binary": (pa.large_binary(), [b"\xff\xd8"], ["not UTF-8"]),
    "uint8": (pa.list_(pa.uint8()), [[1, 255]], [[1, 255]]),
    "nan": (pa.float64(), [float("nan"), 1.5], ["NaN or infinity", 1.5]),
    "nan in a list": (pa.list_(pa.float32()), [[1.0, float("inf")]], ["NaN or infinity"]),
    "map": (pa.map_(pa.string(), pa.int8()), [[("a", 1), ("b", None)]], [{"a": 1, "b": None}]),
    "map of numbers": (pa.map_(pa.int8(), pa.int8()), [[(1, 1)]], ["not a JSON value"]),
    "map with a repeated key": (pa.map_(pa.string(), pa.int8()), [[("a", 1), ("a", 2)]], ["repeated key"]),
    "json": (pa.json_(), ['{"a": null}', "[1, null]"], [{"a": None}, [1, None]]),
    "bad json": (pa.json_(), ['{"a": NaN}', "{"], ["NaN or infinity", "malformed JSON"]),
    "json as text": (pa.string(), ['{"a": null}'], ['{"a": null}']),
    "uuid": (pa.uuid(), [b"0" * 16], ["30303030-3030-3030-3030-303030303030"]),
    "list with null": (pa.list_(pa.struct([("a", pa.int8())])), [[None, {"a": None}]], [[None, {}]]),
    "float32 in a struct": (pa.struct([("a", pa.float32())]), [{"a": 0.1}], [{"a": 0.1}]),
}


@pytest.mark.parametrize("name", TYPES)
def test_values_of_every_type_are_json_or_refused(name):
    type_, values, expected = TYPES[name]
    found = rows_of(type_, values)
    assert found == expected
    json.dumps(found, allow_nan=False)


json_values = st.recursive(
    st.text(max_size=3), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner)
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"x": st.dictionaries(st.sampled_from("abc"), st.sampled_from(["t", 1, [2]]))}), min_size=1, max_size=4))  # fmt: skip  # noqa: E501
def test_structs_lose_only_their_nulls(rows):
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return  # a field of two types
    assert [row for row, _ in ArrowRows(table.schema, "x").of_batch(table)] == rows


def test_a_column_that_json_cannot_hold_matters_only_if_it_is_read(prepared, chatml, tmp_path):
    table = pa.table({"text": ["a", "b"], "digest": pa.array([b"\xff", b"\xfe"])})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert len(prepared(chatml, train="x.parquet").train) == 2
    with pytest.raises(LoraError) as caught:
        prepared(chatml, train="x.parquet", columns={"text": "digest"})
    assert caught.value.details[0] == "x.parquet:1: digest: is 1 bytes of binary data, not text"


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = pa.array([b"a", b"\xff"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())})
    parquet.write_table(table, "x.parquet")
    with pytest.raises(LoraError) as caught:
        check_rows(DataSpec(train="x.parquet", eval=None), "causal-lm", lambda line: None)
    assert caught.value.details == ("x.parquet:2: is not UTF-8: byte 0xff of a text",)


def test_two_columns_of_one_name_are_refused():
    schema = pa.schema([("a", pa.int8()), ("a", pa.int8())])
    with pytest.raises(LoraError, match="the column 'a' occurs twice"):
        ArrowRows(schema, "x.parquet")


def test_json_columns_of_datasets_keep_their_nulls(tmp_path):
    import datasets

    rows = {"text": ["a"], "tools": [[{"b": 0}, {"c": None}]]}
    dataset = datasets.Dataset.from_dict(rows, on_mixed_types="use_json")
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "x.parquet"))
    for path in ("saved", "x.parquet"):
        [source] = train_sources(DataSpec(train=str(tmp_path / path)))
        assert [record.row["tools"] for record in read_records(source)] == rows["tools"]
