"""Segments: literal text, of which exactly the segments with label true carry loss."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.encode import CausalLMEncoder, EncodedRow
from lora_cli.data.formats import parse_row
from lora_cli.data.turns import TurnOptions
from lora_cli.recipe.schema import DataSpec
from tests.inputs.tiny_tokenizers import build, supervised_texts

ENCODER = CausalLMEncoder(DataSpec(train="x"), build("<|im_end|>", eos="</s>"))


def lines(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


segments = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.lists(st.sampled_from([*"ab \n漢", "capital", " the", "<|im_end|>"]), max_size=5).map("".join),
            "label": st.booleans(),
        }
    ),
    min_size=1,
    max_size=5,
).filter(lambda row: any(segment["label"] and segment["text"] for segment in row))


@settings(max_examples=80, deadline=None)
@given(row=segments)
def test_the_text_with_loss_is_that_of_the_labels(row: list[dict[str, Any]]):
    (encoded,) = ENCODER.encode([parse_row({"segments": row}, "segments", TurnOptions())])
    marks = [(letter, segment["label"]) for segment in row for letter in segment["text"]]
    text = "".join(letter for letter, _ in marks)
    end = "" if text.endswith("<|im_end|>") else "</s>"
    if not isinstance(encoded, EncodedRow):
        assert encoded.reason == "nothing to learn"  # only the first token has a label
        return
    decode = ENCODER.tokenizer.backend_tokenizer.decode
    assert decode(encoded.ids.tolist(), skip_special_tokens=False) == text + end
    learnt = []
    wanted = [letter for letter, loss in [*marks, (end, marks[-1][1])] if loss]
    for start, stop in encoded.answer_spans:
        learnt.append(decode(encoded.ids[start:stop].tolist(), skip_special_tokens=False))
    assert "".join(learnt) == "".join(wanted)
    # The first token carries no loss, because no token predicts it.
    assert encoded.supervised == sum(stop - max(start, 1) for start, stop in encoded.answer_spans)


def test_rows_of_axolotl_are_recognized_and_literal(prepared, base):
    row = {
        "segments": [
            {"label": False, "text": "<s>Hello "},
            {"label": True, "text": "Hi</s>"},
            {"label": False, "text": "More "},
            {"label": True, "text": "Yes</s>"},
        ]
    }
    data = prepared(base, files=lines(row))
    assert supervised_texts(data.train[0], base) == ["Hi</s>", "Yes</s>"]
    assert base.decode(data.train[0].input_ids) == "<s>Hello Hi</s>More Yes</s>"
    assert data.ledger.table()[0] == "train.jsonl: segments (its rows have segments)"
    for loss_on in ("all", "last-turn"):  # as for tokens, the row's own labels are the only mask
        assert prepared(base, loss_on=loss_on).fingerprint == data.fingerprint


def test_bos_and_eos_are_added_where_they_are_missing(prepared, base):
    rows = [
        {"segments": [{"label": 0, "text": "Hello "}, {"label": 1, "text": "Hi"}]},
        {"segments": [{"label": "true", "text": "Hello "}, {"label": "false", "text": "Hi"}]},
        {"segments": [{"weight": 1, "text": "Hello "}, {"train": False, "text": "Hi"}]},
    ]
    data = prepared(base, files=lines(*rows))
    assert [supervised_texts(row, base) for row in data.train] == [["Hi</s>"], ["Hello "], ["Hello "]]
    assert all(base.decode(row.input_ids) == "<s>Hello Hi</s>" for row in data.train)
