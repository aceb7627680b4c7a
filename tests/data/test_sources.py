"""Every kind of source gives the same rows, with correct locations."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data import readers
from lora_cli.data.data_file import data_file
from lora_cli.data.examples import check_rows
from lora_cli.data.file_sources import looks_local
from lora_cli.data.formats import FORMATS
from lora_cli.data.read_tables import read_csv
from lora_cli.data.records import BadRow
from lora_cli.data.sources import read_records, train_sources
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec, FormatName

ROWS = [{"prompt": f"question {i} é", "completion": f'answer\n{i}, "so"'} for i in range(5)]


def jsonl(rows: list[dict[str, str]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def csv_of(rows: list[dict[str, str]], end: str = "\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().replace("\n", end)


def parquet_of(rows: list[dict[str, str]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


BOM = "\ufeff"
SAME = {
    "train.jsonl": jsonl(ROWS),
    "crlf.jsonl": jsonl(ROWS, "\r\n"),
    "bom.jsonl": BOM + jsonl(ROWS) + "\n\n",
    "no-end.jsonl": jsonl(ROWS).removesuffix("\n"),
    "train.json": json.dumps(ROWS),
    "indented.json": BOM + json.dumps(ROWS, indent=4).replace("\n", "\r\n") + "\r\n",
    "train.csv": csv_of(ROWS),
    "crlf.csv": BOM + csv_of(ROWS, "\r\n"),
    "train.parquet": parquet_of(ROWS),
}


@pytest.mark.parametrize("name", SAME)
def test_every_file_type_gives_the_same_tokens(prepared, chatml, name: str):
    first = prepared(chatml, files={"train.jsonl": SAME["train.jsonl"]})
    data = prepared(chatml, files={name: SAME[name]}, train=name)
    assert data.fingerprint == first.fingerprint
    assert [row.where.split(":")[0] for row in data.train] == [name] * 5


def test_locations_are_line_numbers(tmp_path):
    text = 'prompt,completion\na,"b\nc"\n\n"d\n\ne",f\ng,h\n'
    (tmp_path / "x.csv").write_text(text)
    assert [line.number for line in read_csv(data_file(tmp_path / "x.csv"))] == [2, 5, 8]
    (tmp_path / "x.json").write_text('\n[\n\n{"a": "b\\n"}, {"a":\n1},\n{}]\n')
    assert [line.number for line in readers.read_json(data_file(tmp_path / "x.json"))] == [4, 4, 6]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone \r\n\n  \n\ttwo\n")
    lines = list(readers.read_txt(data_file(tmp_path / "x.txt")))
    assert [(line.number, line.row) for line in lines] == [(1, {"text": "one "}), (4, {"text": "\ttwo"})]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=6),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 3),
    plain=st.booleans(),
)
def test_a_json_array_reads_the_same_with_any_chunk_size(tmp_path_factory, rows, chunk, indent, plain):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", chunk)
        found = [line.row for line in readers.read_json(data_file(path))]
    flawed = [readers.find_invalid_characters(row) is not None for row in rows]
    assert [row for row, bad in zip(found, flawed, strict=True) if not bad] == [
        row for row, bad in zip(rows, flawed, strict=True) if not bad
    ]
    # An unescaped NUL is a control character, which JSON strings may not contain.
    assert [isinstance(row, BadRow) for row in found] == flawed


def test_a_folder_is_read_in_order_without_hidden_files(prepared, chatml):
    files = {
        "data/b.jsonl": jsonl(ROWS[:2]),
        "data/a.csv": csv_of(ROWS[2:4]),
        "data/part/c.parquet": parquet_of(ROWS[4:]),
        "data/.hidden.md": "no",
        "data/.cache/x.bin": "no",
    }
    data = prepared(chatml, files=files, train="data")
    assert [row.where for row in data.train] == [
        *("data/a.csv:2", "data/a.csv:4", "data/b.jsonl:1", "data/b.jsonl:2", "data/part/c.parquet:1")
    ]


def test_datasets_of_save_to_disk_are_read(prepared, chatml, tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "many"))
    plain = prepared(chatml, files={"train.jsonl": jsonl(ROWS)})
    assert prepared(chatml, train="one").fingerprint == plain.fingerprint
    data = prepared(chatml, train="many", eval="many")
    assert data.train.fingerprint == plain.train.fingerprint
    assert data.eval is not None
    assert [row.where for row in data.eval] == ["many[test]:1"]
    assert data.ledger.leaked == 1
    with pytest.raises(LoraError, match="many has no split 'dev'") as caught:
        prepared(chatml, train=[{"path": "many", "split": "dev"}])
    assert str(caught.value.hint).startswith("set `split` to one of train, test")


def test_an_unavailable_hub_dataset_gives_a_one_line_message(prepared, chatml, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoraError, match="owner/rows is not a local file or folder") as caught:
        prepared(chatml, train="owner/rows")
    assert "\n" not in caught.value.message


@pytest.fixture
def hub(monkeypatch):
    """Return a function that sets the dataset which `datasets.load_dataset` returns, as tests cannot reach the hub."""
    import datasets

    def serve(dataset: datasets.Dataset, subsets: tuple[str, ...] = ()) -> None:
        def load(path: str, name: str | None, *, split: str | None) -> object:
            assert path == "owner/rows"
            if subsets and name not in subsets:
                raise ValueError(f"Config name is missing.\nPlease pick one among the available configs: {subsets}")
            return dataset if split else datasets.DatasetDict({"train": dataset})

        monkeypatch.setattr(datasets, "load_dataset", load)

    return serve


def test_a_hub_dataset_is_read_like_a_saved_one(prepared, chatml, hub):
    import datasets

    hub(datasets.Dataset.from_list(ROWS))
    one = prepared(chatml, train="owner/rows")
    two = prepared(chatml, train=[{"path": "owner/rows", "split": "train"}])
    assert one.fingerprint == two.fingerprint
    assert one.train[4].where == "owner/rows[train]:5"


def test_a_configuration_of_a_hub_dataset_is_its_subset(prepared, chatml, hub):
    import datasets

    hub(datasets.Dataset.from_list(ROWS), subsets=("cola", "sst2"))
    data = prepared(chatml, train=[{"path": "owner/rows", "subset": "cola"}])
    assert data.train[4].where == "owner/rows[cola, train]:5"
    with pytest.raises(LoraError, match="Config name is missing") as caught:
        prepared(chatml, train="owner/rows")
    assert "`subset`" in str(caught.value.hint)
    with pytest.raises(LoraError, match="which has no subset 'cola'"):
        prepared(chatml, files={"train.jsonl": jsonl(ROWS)}, train=[{"path": "train.jsonl", "subset": "cola"}])


def test_numbered_classes_are_read_by_their_names(tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels, "tags": datasets.List(labels)})
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    [source] = train_sources(DataSpec(train=str(tmp_path / "saved")))
    assert [record.row for record in read_records(source)] == [
        {"text": "a", "label": "yes", "tags": ["no", "yes"]},
        {"text": "b", "label": -1, "tags": []},  # no label, as in the test splits of GLUE
    ]


def test_columns_are_renamed_and_unused_columns_are_listed(prepared, chatml):
    rows = [{"q": row["prompt"], "a": row["completion"], "id": i, "prompt": "not this"} for i, row in enumerate(ROWS)]
    data = prepared(
        chatml, files={"train.jsonl": jsonl(rows)}, columns={"prompt": "q"}, train=[
            {"path": "train.jsonl", "columns": {"completion": "a"}}
        ]
    )  # fmt: skip
    assert data.fingerprint == prepared(chatml, files={"train.jsonl": jsonl(ROWS)}).fingerprint
    assert "  columns not used: id (5 rows)" in data.ledger.table()


def test_check_without_tokenizer_counts_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(jsonl(ROWS) + "nope\n")
    (tmp_path / "test.csv").write_text(csv_of(ROWS))
    messages: list[str] = []
    spec = DataSpec(train="train.jsonl", eval="test.csv", on_bad_row="skip")
    first, second = check_rows(spec, "causal-lm", messages.append)
    assert (first.read, first.bad) == (6, {"malformed JSON": 1})
    assert (second.source, second.format, second.read, second.bad) == ("test.csv", "prompt-completion", 5, {})
    assert messages[1] == "skipped train.jsonl:6: malformed JSON at column 1: expecting value"


def test_every_format_of_the_recipe_is_in_the_table():
    assert set(FORMATS) == set(FormatName.__args__)


def test_local_paths_and_hub_ids_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    local = ["./x", "/x", "../x", "~/x", "x.jsonl", "a/b.json", "a/b/c", "data/x"]
    assert [name for name in local if not looks_local(name)] == []
    assert [name for name in ["gsm8k", "openai/gsm8k", "owner/rows-v1.5"] if looks_local(name)] == []
