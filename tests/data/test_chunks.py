"""Documents that are split at data.max_length: each token carries loss once, and all chunks are in the same split."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.chunks import split_document
from lora_cli.data.encode import CausalLMEncoder, EncodedRow
from lora_cli.data.formats import Document
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.tiny_tokenizers import build

PLAIN = CausalLMEncoder(DataSpec(train="x"), build(eos="</s>"))
WITH_BOS = CausalLMEncoder(DataSpec(train="x"), build(eos="</s>", bos="<s>", adds_bos=True))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abcdefgh é", min_size=2, max_size=80).filter(str.strip),
    length=st.integers(3, 20),
    stride=st.integers(0, 18),
    encoder=st.sampled_from([PLAIN, WITH_BOS]),
)
def test_each_token_carries_loss_once_with_the_tokens_before_it_as_context(text, length, stride, encoder):
    (row,) = encoder.encode([Document(text)])
    assert isinstance(row, EncodedRow)
    bos = row.ids[: row.prefix].tolist()
    if max(stride, 1 - len(bos)) + len(bos) >= length:
        with pytest.raises(LoraError, match="leave no room for new tokens"):
            split_document(row, length=length, stride=stride)
        return
    document = row.ids[row.prefix :].tolist()
    learnt: list[int] = []
    chunks = split_document(row, length=length, stride=stride) if row.length > length else [row]
    for number, chunk in enumerate(chunks):
        ids = chunk.ids.tolist()
        ((start, stop),) = chunk.supervised_spans
        assert ids[: len(bos)] == bos
        assert (len(ids) <= length, stop == len(ids), start >= 1) == (True, True, True)
        context = ids[len(bos) : start]
        done = len(learnt) if bos else len(learnt) + 1  # without BOS, no token predicts the first
        if number:
            assert document[done - len(context) : done] == context
            last = number == len(chunks) - 1
            assert len(context) == max(stride, 1 - len(bos)) or (last and stop - start == 1)
        learnt += ids[start:stop]
    assert learnt == (document if bos else document[1:])


def texts(*values: str) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps({"text": value}) + "\n" for value in values)}


def test_split_documents_are_counted_and_end_with_eos_once(prepared, chatml):
    data = prepared(chatml, files=texts("x" * 50, "short"), overlong="split", stride=3, max_length=20)
    assert data.ledger.table() == [
        "train.jsonl: text (its rows have text)",
        "  2 rows read + 2 by splitting = 4 for train",
        "  1 document split at data.max_length",
        *data.ledger.table()[3:],
    ]
    assert [row.where for row in data.train] == ["train.jsonl:1"] * 3 + ["train.jsonl:2"]
    ends = [row.input_ids[-1] == chatml.eos_token_id for row in data.train]
    assert ends == [False, False, True, True]
    whole = prepared(chatml, files=texts("x" * 50, "short"))
    assert data.ledger.train.supervised == whole.ledger.train.supervised


def test_the_last_chunk_is_not_eos_alone(prepared, base):
    data = prepared(base, files=texts("x" * 9), overlong="split", max_length=10)
    assert [row.input_ids.tolist().count(base.bos_token_id) for row in data.train] == [1, 1]
    assert base.decode(data.train[1].input_ids) == "<s>" + "x" * 8 + "</s>"
    assert data.train.supervised.tolist() == [9, 1]


def test_chunks_of_a_document_are_held_out_together(prepared, chatml):
    values = [f"{number} " + chr(97 + number) * 60 for number in range(26)]
    data = prepared(chatml, files=texts(*values), overlong="split", max_length=16, eval=0.3)
    train, held_out = ({row.where for row in split} for split in (data.train, data.eval or []))
    assert train
    assert held_out
    assert not train & held_out
    assert len(train | held_out) == len(values)
    assert sum(entry.held_out for entry in data.ledger.entries) == len(data.eval or [])


def test_rows_that_are_short_enough_are_unchanged_by_split(prepared, chatml):
    split = prepared(chatml, files=texts("a", "b c"), overlong="split", eval=0.5)
    assert split.fingerprint == prepared(chatml, files=texts("a", "b c"), eval=0.5).fingerprint


def test_long_rows_of_other_formats_are_an_error_also_beside_documents(prepared, chatml):
    chat = {"messages": [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]}
    files = {"a.jsonl": json.dumps({"text": "x" * 50}), "b.jsonl": json.dumps(chat)}
    sources = [{"path": name} for name in files]
    with pytest.raises(LoraError, match=r"b.jsonl: 1 of 1 rows is longer than data.max_length \(20 tokens\)") as caught:
        prepared(chatml, files=files, train=sources, overlong="split", max_length=20)
    assert str(caught.value.hint).startswith("only rows of format text can be split")
    data = prepared(chatml, train=sources, overlong="split", max_length=80)
    assert sorted(data.train.lengths.tolist()) == [51, 64]
