"""The ledger counts every row; splits and weights are seeded, disjoint and stable."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cli.data.prepare import PreparedData, prepare_data
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.data.conftest import Prepare


def texts(*values: object) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def decoded_texts(data: PreparedData, tokenizer) -> tuple[list[str], list[str]]:
    splits = (data.train, data.eval or [])
    return tuple([tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows] for rows in splits)


fine = st.integers(0, 20).map(lambda number: texts(f"row {number}"))
long = st.integers(20, 60).map(lambda number: texts("x" * number))
flawed = st.sampled_from(["nope\n", texts(None), texts(3), texts(""), '{"txt": 1}\n', '{"text": "a", "text": "b"}\n'])


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(st.one_of(fine, fine, long, flawed), min_size=1, max_size=12), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 3.25]), min_size=3, max_size=3),
    overlong=st.sampled_from(["drop", "truncate"]),
    share=st.sampled_from([None, 0.01, 0.3, 0.9]),
    seed=st.integers(0, 3),
)
def test_counts_add_up(chatml, tmp_path_factory, files, weights, overlong, share, seed):
    folder: Path = tmp_path_factory.mktemp("rows")
    sources = []
    for number, (lines, weight) in enumerate(zip(files, weights, strict=False)):
        (folder / f"{number}.jsonl").write_text("".join(lines))
        sources.append({"path": str(folder / f"{number}.jsonl"), "weight": weight, "format": "text"})
    section = {"train": sources, "eval": share, "overlong": overlong, "max_length": 20, "on_bad_row": "skip"}
    spec = DataSpec.model_validate({**section, "max_loss": 1.0})
    try:
        data = prepare_data(spec, chatml, seed=seed, cache=folder / "cache", info=lambda line: None)
    except LoraError as error:
        if "no rows are left" not in error.message and "all rows are identical" not in error.message:
            raise
        return
    for lines, entry in zip(files, data.ledger.entries, strict=True):
        tally = entry.tally
        assert tally.read == len(lines) == tally.kept + sum(tally.dropped.values())
        assert tally.kept == entry.rows - entry.repeated + entry.left_out + entry.held_out
        assert tally.ends_lost >= tally.answers_cut >= 0
        assert tally.cut == tally.ends_lost  # each of these rows is one answer
    assert sum(entry.rows for entry in data.ledger.entries) == len(data.train) == data.ledger.train.rows
    assert data.ledger.train.tokens == sum(len(row.input_ids) for row in data.train)
    assert data.ledger.train.supervised == sum((row.labels != -100).sum() for row in data.train)
    assert data.ledger.train.lengths["max"] == data.train.lengths.max() <= 20
    train, held_out = decoded_texts(data, chatml)
    assert not set(train) & set(held_out)
    json.dumps(data.ledger.to_json())
    assert data.ledger.table()


ROWS = texts(*[f"row {i}" for i in range(400)])
HALF = texts(*[f"row {i}" for i in range(200)])


def test_held_out_rows_stay_when_rows_are_added(prepared: Prepare, chatml):
    before = decoded_texts(prepared(chatml, files={"train.jsonl": ROWS}, eval=0.1), chatml)[1]
    after = decoded_texts(prepared(chatml, files={"train.jsonl": texts("new") + HALF}, eval=0.1), chatml)[1]
    kept = set(decoded_texts(prepared(chatml, files={"train.jsonl": HALF}), chatml)[0])
    assert 20 <= len(before) <= 60
    assert set(before) & kept == set(after) - {"new"}
    other = decoded_texts(prepared(chatml, files={"train.jsonl": ROWS}, eval=0.1, seed=1), chatml)[1]
    assert set(other) != set(before)


def test_identical_rows_are_in_the_same_split(prepared: Prepare, chatml):
    data = prepared(chatml, files={"train.jsonl": texts(*[f"row {i % 7}" for i in range(70)])}, eval=0.4)
    train, held_out = decoded_texts(data, chatml)
    assert not set(train) & set(held_out)
    assert Counter(train) + Counter(held_out) == Counter({f"row {i}": 10 for i in range(7)})


def test_each_split_gets_at_least_one_row(prepared: Prepare, chatml):
    two = {"train.jsonl": texts("one", "two")}
    assert len(prepared(chatml, files=two, eval=0.000001).eval or []) == 1
    assert len(prepared(chatml, files=two, eval=0.999999).train) == 1
    messages: list[str] = []
    single = prepared(chatml, files={"train.jsonl": texts("one")}, eval=0.5, info=messages.append)
    assert single.eval is None
    assert messages[-1] == "data.eval: the data has only one row, so none is held out"


def test_weights_repeat_and_leave_out(prepared: Prepare, chatml):
    def counts(weight: float, seed: int = 0) -> Counter[str]:
        source = [{"path": "train.jsonl", "weight": weight}]
        return Counter(decoded_texts(prepared(chatml, files={"train.jsonl": ROWS}, train=source, seed=seed), chatml)[0])

    assert set(counts(2).values()) == {2}
    half, more = counts(0.5), counts(1.5)
    assert (len(half), set(half.values())) == (200, {1})
    assert (len(more), sum(more.values())) == (400, 600)
    assert {row for row, count in more.items() if count == 2} == set(half)
    assert counts(0.5, seed=1) != half
    entry = prepared(chatml, train=[{"path": "train.jsonl", "weight": 2.5}], eval=0.1).ledger.entries[0]
    assert entry.repeated == entry.rows - (400 - entry.held_out) > 0


def test_leaked_rows_are_counted(prepared: Prepare, chatml):
    files = {"train.jsonl": texts("a", "b", "c"), "test.jsonl": texts("b", "x", "b")}
    data = prepared(chatml, files=files, eval="test.jsonl")
    assert data.ledger.leaked == 2
    assert "  2 evaluation rows also in train: their loss is not a valid test" in data.ledger.table()


def test_the_table_lists_all_counts(prepared: Prepare, chatml):
    rows = [{"text": "row " + "x" * i, "id": i} for i in range(18)]
    files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows) + "nope\n"}
    data = prepared(chatml, files=files, on_bad_row="skip", overlong="truncate", max_length=12, eval=0.2)
    assert data.ledger.table() == [
        "train.jsonl: text (its rows have text)",
        f"  19 rows read = {len(data.train)} for train + {len(data.eval or [])} held out for eval + 1 dropped",
        "  dropped 1: malformed JSON",
        "  9 rows truncated to data.max_length",
        "  9 answers truncated",
        "  9 end-of-turn tokens lost: the model cannot learn to stop from these answers",
        "  columns not used: id (18 rows)",
        *data.ledger.table()[-2:],
    ]
    assert data.ledger.table()[-1].startswith(f"eval: {len(data.eval or [])} row")


def test_dropping_more_rows_than_allowed_stops_the_run(prepared: Prepare, chatml):
    files = {"train.jsonl": ROWS + "nope\n" * 100}
    with pytest.raises(
        LoraError, match=r"100 of 500 rows are dropped \(20.0%\), more than data.max_loss allows \(10.0%\)"
    ):
        prepared(chatml, files=files, on_bad_row="skip")
    assert len(prepared(chatml, on_bad_row="skip", max_loss=0.2).train) == 400


def test_rows_are_an_immutable_sequence(prepared: Prepare, chatml):
    rows = prepared(chatml, files={"train.jsonl": ROWS}).train
    assert rows[-1].where == "train.jsonl:400"
    with pytest.raises(IndexError):
        rows[400]
    with pytest.raises(ValueError, match="read-only"):
        rows.lengths[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        rows[0].input_ids[0] = 1
    assert rows.lengths.dtype == rows.supervised.dtype == rows[0].input_ids.dtype == rows[0].labels.dtype == np.int32
    assert [len(row.input_ids) for row in rows] == rows.lengths.tolist()
