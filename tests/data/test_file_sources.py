"""Files of a source: folders with splits, globs, compressed files, delimiters, max_rows, dedup."""

import bz2
import gzip
import json
import lzma
import os
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data import file_sources, readers
from lora_cli.data.data_file import data_file
from lora_cli.data.sources import eval_sources, read_records, train_sources
from lora_cli.data.split_names import group_by_split
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.bad_files import zip_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a function that creates files of one row each, whose text is the file's name."""
    monkeypatch.chdir(tmp_path)

    def create(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")

    return create


def read(sources: list) -> list[str]:
    return [record.row["text"].removeprefix("d/") for source in sources for record in read_records(source)]


SPLITS = {  # files of a folder: those of data.train, those of data.eval
    "names": ("train.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
    "validation before test": ("test.jsonl train.jsonl validation.jsonl", "train.jsonl", "validation.jsonl"),
    "words": ("my-train_1.jsonl my-train_2.jsonl dev_set.jsonl", "my-train_1.jsonl my-train_2.jsonl", "dev_set.jsonl"),
    "folders": ("train/a.jsonl train/b.jsonl valid/a.jsonl", "train/a.jsonl train/b.jsonl", "valid/a.jsonl"),
    "shards": (
        "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl data/test-00000-of-00001.jsonl",
        "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ),
    "one kind of shards": (
        "train_sft-00000-of-00001.jsonl test_sft-00000-of-00001.jsonl",
        "train_sft-00000-of-00001.jsonl",
        "test_sft-00000-of-00001.jsonl",
    ),
    "upper case": ("TRAIN.jsonl Eval.jsonl", "TRAIN.jsonl", "Eval.jsonl"),
    "other words": ("latest.jsonl trainer.jsonl", "latest.jsonl trainer.jsonl", None),
    "train and unnamed": ("more.jsonl train.jsonl", "more.jsonl train.jsonl", None),
    "beside the data": ("train.jsonl test.jsonl README.md LICENSE .gitattributes dataset_infos.json a/README.txt", "train.jsonl", "test.jsonl"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_splits_of_a_folder_are_told_by_name(folder, case):
    files, train, evaluation = SPLITS[case]
    folder(*(f"d/{name}" for name in files.split()))
    spec = DataSpec(train="d", eval="d" if evaluation else None)
    in_train = train_sources(spec)
    assert read(in_train) == train.split()
    assert read(eval_sources(spec, in_train)) == (evaluation or "").split()
    # A glob of the same files is no different.
    pattern = DataSpec(train="d/**/*.jsonl", eval="d/**/*.jsonl" if evaluation else None)
    in_train = train_sources(pattern)
    assert read(in_train) == train.split()
    assert read(eval_sources(pattern, in_train)) == (evaluation or "").split()


def test_what_is_not_read_is_told_once(folder):
    folder("d/train.jsonl", "d/test.jsonl", "d/README.md", "d/.gitattributes")
    told: list[str] = []
    [source] = train_sources(DataSpec(train="d"), info=told.append)
    assert told == [
        "d: not read, as they contain no rows: .gitattributes, README.md",
        "d: 1 file of split train by name; not read: test.jsonl",
    ]
    assert source.name == "d[train]"


def test_files_without_a_split_in_their_name_are_told_beside_train_files(folder):
    folder("d/train.jsonl", "d/holdout.jsonl")
    told: list[str] = []
    train_sources(DataSpec(train="d"), info=told.append)
    assert told == ["d: read as train too, as their names tell no split: holdout.jsonl"]


def test_a_split_is_selected_by_its_name(folder):
    folder("d/train.jsonl", "d/dev.jsonl", "d/test.jsonl")
    for split, file in {"dev": "dev", "validation": "dev", "test": "test", "train": "train"}.items():
        assert read(train_sources(DataSpec.model_validate({"train": [{"path": "d", "split": split}]}))) == [
            f"{file}.jsonl"
        ]


REFUSED = {  # files of a folder: the message
    "train_test.jsonl": "data: train_test.jsonl has the words of two splits in its name: test and train",
    "test/train.jsonl": "data: test/train.jsonl has the words of two splits in its name: test and train",
    "more.jsonl test.jsonl": "data: d: the name of more.jsonl tells no split, others tell test",
    "test.jsonl": "data: d has no train files, only test",
    "train-00000-of-00003.jsonl train-00002-of-00003.jsonl": "data: d: 1 of 3 shards of train are missing, the first "
    "is train-00001-of-00003",
    "train_sft-00000-of-00001.jsonl train_gen-00000-of-00001.jsonl": "data: d has no train files, only train_gen, "
    "train_sft",
    "README.md LICENSE": "data: the folder d contains no data files",
    "a.jsonl a.jsonl.gz": "data: d contains a.jsonl and a.jsonl.gz, the same file twice",
}


@pytest.mark.parametrize("files", REFUSED)
def test_ambiguous_folders_are_refused(folder, files):
    folder(*(f"d/{name}" for name in files.split()))
    with pytest.raises(LoraError) as caught:
        train_sources(DataSpec(train="d"))
    assert caught.value.message == REFUSED[files]
    assert caught.value.hint


def test_shards_of_two_kinds_are_selected_by_name(folder):
    folder("d/train_sft-00000-of-00001.jsonl", "d/train_gen-00000-of-00001.jsonl", "d/test-00000-of-00001.jsonl")
    spec = DataSpec.model_validate({"train": [{"path": "d", "split": "train_sft"}]})
    assert read(train_sources(spec)) == ["train_sft-00000-of-00001.jsonl"]


@given(st.lists(st.sampled_from(["train", "test", "dev", "part", "x-train_1", "a/val/b", "train/0", "latest"]), unique=True))  # fmt: skip  # noqa: E501
def test_every_file_belongs_to_one_split(names):
    files = [f"{name}.jsonl" for name in names]
    groups = group_by_split(files)
    assert sorted(file for group in groups.values() for file in group) == sorted(files)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [("d/train.jsonl", "d/*.jsonl"), ("d", "./d/train.jsonl"), ("d/train.jsonl", [{"path": "d", "split": "train"}])],
)
def test_a_file_in_train_and_eval_is_refused(folder, train, evaluation):
    folder("d/train.jsonl", "d/more.jsonl")
    spec = DataSpec.model_validate({"train": train, "eval": evaluation})
    with pytest.raises(LoraError, match=r"reads a file of data\.train: d/train\.jsonl"):
        eval_sources(spec, train_sources(spec))


def test_a_file_of_two_train_sources_is_refused(folder):
    folder("d/a.jsonl", "d/b.jsonl")
    spec = DataSpec.model_validate({"train": [{"path": "d/a.jsonl"}, {"path": "d/*"}]})
    with pytest.raises(LoraError, match=r"data.train: d/\* and d/a.jsonl both read d/a.jsonl"):
        train_sources(spec)
    # With other template variables or roles, its rows are others.
    ways = [{}, {"template_variables": {"enable_thinking": False}}, {"roles": {"narrator": "user"}}]
    spec = DataSpec.model_validate({"train": [{"path": "d/a.jsonl", **way} for way in ways]})
    assert len(train_sources(spec)) == 3
    # With other columns too.
    spec = DataSpec.model_validate({"train": [{"path": "d/a.jsonl"}, {"path": "d/*", "columns": {"text": "b"}}]})
    assert len(train_sources(spec)) == 2


def test_globs_and_literal_brackets(folder):
    folder("d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl", "d/.hidden.jsonl", "x[1].jsonl", "x1.jsonl")
    assert read(train_sources(DataSpec(train="d/*.jsonl"))) == ["a.jsonl", "b.jsonl"]
    assert read(train_sources(DataSpec(train="d/**/*.jsonl"))) == ["a.jsonl", "b.jsonl", "e/c.jsonl"]
    assert read(train_sources(DataSpec(train="d/[ab].jsonl"))) == ["a.jsonl", "b.jsonl"]
    assert read(train_sources(DataSpec(train="x[1].jsonl"))) == ["x[1].jsonl"]
    with pytest.raises(LoraError, match=r"d/\* matches|d/e\* matches only folders"):
        train_sources(DataSpec(train="d/e*"))


@pytest.mark.parametrize("path", ["d", "d/**", "d/**/*.jsonl", "d/*"])
def test_a_folder_with_too_many_files_is_not_read(path: str, folder, monkeypatch):
    monkeypatch.setattr(file_sources, "MAX_ENTRIES", 20)
    folder(*(f"d/{number}.jsonl" for number in range(15)))
    assert len(read(train_sources(DataSpec(train=path)))) == 15
    folder(*(f"d/{number}.jsonl" for number in range(25)))
    with pytest.raises(LoraError, match="more than 20 files"):
        train_sources(DataSpec(train=path))


def test_the_root_is_told_soon():
    start = time.monotonic()
    for path in ("/", "/**"):
        with pytest.raises(LoraError, match=r"more than|cannot be read"):
            train_sources(DataSpec(train=path))
    assert time.monotonic() - start < 10


def test_hidden_folders_are_not_entered(folder):
    folder("d/a.jsonl", *(f"d/.cache/{number}.jsonl" for number in range(9)))
    told: list[str] = []
    assert read(train_sources(DataSpec(train="d"), info=told.append)) == ["a.jsonl"]
    assert told == ["d: not read, as they contain no rows: .cache"]


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    """Its rows would be missing silently."""
    folder("d/a.jsonl", "d/closed/b.jsonl")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LoraError, match="data: the folder d/closed cannot be read: Permission denied"):
        train_sources(DataSpec(train="d"))


TEXT = '{"text": "é1"}\n{"text": "2"}\n'


def zst(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
    ".zip": lambda content: zip_of({"folder/": b"", "folder/x.jsonl": content, "__MACOSX/folder/._x.jsonl": b"\0"}),
}
CONTENT = {
    ".jsonl": TEXT,
    ".json": '[{"text": "é1"},\n{"text": "2"}]',
    ".csv": "text\né1\n2\n",
    ".tsv": "text\ta\né1\tb\n2\tc\n",
    ".txt": "é1\n2\n",
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENT)
def test_compressed_files_give_the_rows_of_plain_ones(tmp_path, compression, suffix):
    if compression == ".zip":
        data = zip_of({f"x{suffix}": CONTENT[suffix].encode()})
    else:
        data = COMPRESS[compression](CONTENT[suffix].encode())
    (tmp_path / f"x{suffix}{compression}").write_bytes(data)
    (tmp_path / f"x{suffix}").write_text(CONTENT[suffix])
    lines = []
    for name in (f"x{suffix}{compression}", f"x{suffix}"):
        [source] = train_sources(DataSpec(train=str(tmp_path / name)))
        lines.append([(record.line, record.row) for record in read_records(source)])
    assert lines[0] == lines[1]
    assert [row["text"] for _, row in lines[0]] == ["é1", "2"]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file_are_all_read(tmp_path, compression):
    first, second = TEXT.encode().splitlines(keepends=True)
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](first) + COMPRESS[compression](second))
    assert [line.row for line in readers.read_jsonl(data_file(path))] == [{"text": "é1"}, {"text": "2"}]


def test_a_zip_is_read_by_the_name_inside(tmp_path):
    (tmp_path / "x.zip").write_bytes(COMPRESS[".zip"](TEXT.encode()))
    [source] = train_sources(DataSpec(train=str(tmp_path / "x.zip")))
    assert [record.row["text"] for record in read_records(source)] == ["é1", "2"]


def test_the_delimiter_of_a_source(prepared, chatml):
    cells = [("prompt", "completion"), ("a;b", "c\td"), ("e", 'f "g"')]
    files = {}
    for name, delimiter in {"a.csv": ";", "b.csv": "\t", "c.csv": "|", "d.tsv": "\t", "e.csv": ","}.items():
        lines = (delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)
        files[name] = "\n".join(lines) + "\n"
    plain = prepared(chatml, files=files, train="e.csv")
    for name, delimiter in {"a.csv": ";", "b.csv": "\t", "c.csv": "|"}.items():
        data = prepared(chatml, train=[{"path": name, "delimiter": delimiter}])
        assert data.fingerprint == plain.fingerprint
    assert prepared(chatml, train="d.tsv").fingerprint == plain.fingerprint


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_max_rows_reads_the_first_rows_and_tells(prepared, chatml):
    files = {"a.jsonl": rows("1", "2", "3"), "b.jsonl": rows("4", "5")}
    data = prepared(chatml, files=files, train=[{"path": "*.jsonl", "max_rows": 4}])
    assert [row.where for row in data.train] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    assert "  only the first 4 rows are read (max_rows)" in data.ledger.table()
    assert data.ledger.to_json()["sources"][0]["max_rows"] == 4
    all_rows = prepared(chatml, train=[{"path": "*.jsonl", "max_rows": 6}])
    assert len(all_rows.train) == 5
    assert "max_rows" not in "".join(all_rows.ledger.table())


def test_dedup_keeps_the_first_of_equal_rows_over_all_sources(prepared, chatml):
    files = {"a.jsonl": rows("1", "2", "1"), "b.jsonl": rows("2", "3", "3"), "e.jsonl": rows("3", "4", "4")}
    section = {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2.0}], "eval": "e.jsonl"}
    data = prepared(chatml, files=files, dedup="exact", **section)
    assert [row.where for row in data.train] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:2", "b.jsonl:2"]
    assert data.eval is not None
    assert [row.where for row in data.eval] == ["e.jsonl:1", "e.jsonl:2"]
    assert [entry.duplicates for entry in data.ledger.entries] == [1, 2, 1]
    assert "  3 rows read = 2 for train + 1 left out as duplicates" in data.ledger.table()
    assert data.ledger.leaked == 1  # of evaluation rows that are in train, which are told as without dedup
    assert len(prepared(chatml, **section).train) == 9


def test_dedup_comes_before_rows_are_held_out(prepared, chatml):
    texts = [f"{number // 3}" for number in range(150)]
    once = prepared(chatml, files={"x.jsonl": rows(*dict.fromkeys(texts))}, train="x.jsonl", eval=0.2)
    data = prepared(chatml, files={"x.jsonl": rows(*texts)}, train="x.jsonl", eval=0.2, dedup="exact")
    assert data.fingerprint == once.fingerprint
    assert data.ledger.entries[0].duplicates == 100


def test_check_without_a_model_reads_folders_and_globs_by_split(folder, monkeypatch, capsys):
    import sys

    from lora_cli.cli import main

    folder("d/train.jsonl", "d/test.jsonl")
    for path, names in (("d", ("d[train]", "d[test]")), ("d/*.jsonl", ("d/*.jsonl[train]", "d/*.jsonl[test]"))):
        with open("r.yaml", "w") as file:
            file.write(f"model: {{path: x}}\ndata: {{train: {path}, eval: {path}}}\n")
        monkeypatch.setattr(sys, "argv", ["lora", "check", "--no-model", "r.yaml"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        printed = capsys.readouterr().out
        assert [f"{name}: 1 rows of format text" in printed for name in names] == [True, True]
