"""Rows of seq-cls, token-cls and seq2seq-lm: exact ids and labels; invalid rows and labels are rejected."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_cli.data.class_labels import ClassLabels, SourceLabels, label_notes, label_numbers, resolve_labels
from lora_cli.data.encode_classes import LabeledRowEncoder
from lora_cli.data.formats import ClassificationExample, TaggingExample
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.data.conftest import Prepare
from tests.inputs.tiny_tokenizers import build_encoder

KINDS = ("bert", "roberta", "t5")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return build_encoder(request.param)


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_row_has_its_class_and_the_ids_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"text": f"the fox {i}", "label": ["dog", "ant", "cat"][i % 3]} for i in range(7)]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls")
    assert data.labels == ClassLabels("single", ("ant", "cat", "dog"))
    for row, raw in zip(data.train, rows, strict=True):
        assert row.input_ids.tolist() == tokenizer(raw["text"])["input_ids"]
        assert data.labels.names[int(row.labels[0])] == raw["label"]
        assert row.labels.dtype == np.int32
    assert data.ledger.train.supervised == 7
    assert "  labels: dog 3 (42.9%), ant 2 (28.6%), cat 2 (28.6%)" in data.ledger.table()


def test_a_pair_has_the_ids_and_types_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"text": "the fox", "text_pair": "lazy dog", "label": 1}, {"text": "a", "label": 0}]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls")
    expected = tokenizer("the fox", "lazy dog", return_token_type_ids=True)
    assert data.train[0].input_ids.tolist() == expected["input_ids"]
    assert data.train[0].pair_tokens == sum(expected["token_type_ids"])
    assert data.train[1].pair_tokens == 0


@pytest.mark.parametrize(
    ("raw", "labels", "expected"),
    [
        ([2, 0, 1], ClassLabels("single", ("0", "1", "2")), [[2], [0], [1]]),
        (["2", "0", "0"], ClassLabels("single", ("0", "1", "2")), [[2], [0], [0]]),
        ([True, False, True], ClassLabels("single", ("false", "true")), [[1], [0], [1]]),
        ([["b", "a"], [], ["a"]], ClassLabels("multi", ("a", "b")), [[1, 1], [0, 0], [1, 0]]),
        ([[1], [0, 2], []], ClassLabels("multi", ("0", "1", "2")), [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        ([0.5, 1.0, -2.5], ClassLabels("regression", ("value",)), [[0.5], [1.0], [-2.5]]),
        ([[0.5, 1.0], [2.0, 3.0]], ClassLabels("regression", ("value 0", "value 1")), [[0.5, 1.0], [2.0, 3.0]]),
    ],
)
def test_the_kind_of_labels_is_inferred_from_rows(
    raw: list[Any], labels: ClassLabels, expected: Any, prepared: Prepare
):
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate(raw)]
    data = prepared(build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls")
    assert data.labels == labels
    assert [row.labels.tolist() for row in data.train] == expected


def test_integers_are_regression_values_if_the_recipe_sets_regression(prepared: Prepare):
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate([3, 1.5, "2"])]
    data = prepared(build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls", labels="regression")
    assert [row.labels.tolist() for row in data.train] == [[3.0], [1.5], [2.0]]


def test_integer_labels_are_indices_of_the_labels_in_the_recipe(prepared: Prepare):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    data = prepared(
        build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls", labels=["zebra", "ant", "cow"]
    )
    assert data.labels == ClassLabels("single", ("zebra", "ant", "cow"))
    assert [int(row.labels[0]) for row in data.train] == [1, 0]


def test_labels_of_several_sources_get_common_numbers(prepared: Prepare):
    files = {
        "a.jsonl": lines([{"text": f"a{i}", "label": label} for i, label in enumerate(["x", "y"])]),
        "b.jsonl": lines([{"text": f"b{i}", "label": label} for i, label in enumerate(["z", "x", "y"])]),
        "e.jsonl": lines([{"text": f"e{i}", "label": label} for i, label in enumerate(["y", "z"])]),
    }
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2.0}]
    data = prepared(build_encoder("bert"), files=files, task="seq-cls", train=sources, eval="e.jsonl")
    names = [data.labels.names[int(row.labels[0])] for row in data.train]
    assert names == ["x", "y", "z", "x", "y", "z", "x", "y"]
    assert [data.labels.names[int(row.labels[0])] for row in data.eval] == ["y", "z"]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=9,
    ),
    kind=st.sampled_from(KINDS),
)
def test_each_tag_is_at_the_first_token_of_its_word(words: list[str], kind: str):
    encoder = ENCODERS[kind]
    (row,) = encoder.encode([TaggingExample(words, [f"tag{i}" for i in range(len(words))])])
    if isinstance(row, BadRow):  # for example, a character that is not in this small vocabulary
        assert row.reason == "word without token"
        return
    tokenizer = TOKENIZERS[kind]
    encoding = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert row.ids.tolist() == encoding["input_ids"]
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    tags = [
        (int(label.removeprefix("tag")), encoding["offset_mapping"][i])
        for i, label in enumerate(row.label_keys)
        if label
    ]
    assert [number for number, _ in tags] == list(range(len(words)))
    for number, (start, stop) in tags:
        # The token overlaps its word.
        assert start < starts[number] + len(words[number])
        assert stop > starts[number]
    special = [i for i, span in enumerate(encoding["offset_mapping"]) if span == (0, 0)]
    assert all(row.label_keys[i] is None for i in special if encoding["input_ids"][i] in tokenizer.all_special_ids)
    assert row.supervised == len(words)


TOKENIZERS = {kind: build_encoder(kind) for kind in KINDS}
ENCODERS = {
    kind: LabeledRowEncoder("token-cls", DataSpec.model_validate({"train": "x"}), tokenizer)
    for kind, tokenizer in TOKENIZERS.items()
}


def test_only_the_first_token_of_a_word_has_its_label(prepared: Prepare):
    rows = [{"tokens": ["The", "capital", "jumps"], "tags": ["O", "B-LOC", "O"]}]
    tokenizer = build_encoder("bert")
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="token-cls")
    assert data.labels == ClassLabels("single", ("B-LOC", "O"))
    (row,) = data.train
    words = tokenizer("The capital jumps").word_ids()
    names = [data.labels.names[label] for label in row.labels if label != IGNORE_INDEX]
    assert names == ["O", "B-LOC", "O"]
    assert row.labels[0] == row.labels[-1] == IGNORE_INDEX  # [CLS] and [SEP]
    assert len(row.labels) == len(words)


def test_a_target_has_the_ids_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"prompt": "the fox", "completion": "LAZY"}, {"prompt": "dog", "completion": "x y z"}]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq2seq-lm")
    for row, raw in zip(data.train, rows, strict=True):
        assert row.input_ids.tolist() == tokenizer(raw["prompt"])["input_ids"]
        assert row.labels.tolist() == tokenizer(raw["completion"])["input_ids"]
    assert data.labels is None


def test_a_truncated_row_keeps_its_end_token_and_is_counted(prepared: Prepare):
    tokenizer = build_encoder("bert")
    rows = [{"text": "the quick brown fox jumps " * 5, "label": "a"}, {"text": "fox", "label": "b"}]
    truncate = {"overlong": "truncate", "max_length": 8, "max_loss": 0.0}
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls", **truncate)
    ids = data.train[0].input_ids.tolist()
    assert ids == tokenizer(rows[0]["text"], truncation=True, max_length=8)["input_ids"]
    assert ids[-1] == tokenizer.sep_token_id
    assert "  1 row truncated to data.max_length" in data.ledger.table()
    tagged = [{"tokens": ["the", "fox"] * 20, "tags": ["O", "X"] * 20}]
    data = prepared(tokenizer, files={"train.jsonl": lines(tagged)}, task="token-cls", **truncate)
    assert len(data.train[0].input_ids) == 8
    remaining = data.ledger.train.supervised
    assert f"  {40 - remaining} labels or target tokens lost by truncation" in data.ledger.table()


def test_cached_labels_are_the_same(prepared: Prepare):
    rows = lines([{"text": "the fox", "label": 1.5}, {"text": "dog", "label": 2.5}])
    tokenizer = build_encoder("bert")
    first = prepared(tokenizer, files={"train.jsonl": rows}, task="seq-cls")
    assert first.labels.kind == "regression"
    messages: list[str] = []
    again = prepared(tokenizer, task="seq-cls", info=messages.append)
    assert messages == []
    assert [row.labels.tolist() for row in again.train] == [row.labels.tolist() for row in first.train]
    assert again.fingerprint == first.fingerprint


def test_different_labels_give_a_different_fingerprint(prepared: Prepare):
    tokenizer = build_encoder("bert")
    one = prepared(
        tokenizer,
        files={"train.jsonl": lines([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])},
        task="seq-cls",
    )
    two = prepared(
        tokenizer,
        files={"train.jsonl": lines([{"text": "a", "label": "y"}, {"text": "b", "label": "x"}])},
        task="seq-cls",
    )
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_does_not_depend_on_the_name_of_a_class(prepared: Prepare):
    """It is part of a checkpoint: a run of an earlier version of this code is resumed with it."""
    rows = lines([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    data = prepared(build_encoder("bert"), files={"train.jsonl": rows}, task="seq-cls")
    text = f"{data.train.fingerprint}  Labels(kind='single', names=('x', 'y'))"
    assert data.fingerprint == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_labels(kind: str, *labels: str, numbered: bool = False, width: int = 1) -> SourceLabels:
    return SourceLabels(
        kind,
        dict.fromkeys(labels, 1),
        {label: f"f.jsonl:{i}" for i, label in enumerate(labels, 1)},
        numbered,
        width,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "train", "base", "names"),
    [
        ("auto", [source_labels("single", "b", "a")], (), ("a", "b")),
        (
            "auto",
            [source_labels("single", "b", "a")],
            ("b", "c", "a"),
            ("b", "c", "a"),
        ),  # the base model's head has these labels
        ("auto", [source_labels("single", "b", "x")], ("b", "c", "a"), ("b", "x")),
        ("auto", [source_labels("single", "3", "1", numbered=True)], (), ("0", "1", "2", "3")),
        ("auto", [source_labels("single", "1", "0", numbered=True)], ("no", "yes"), ("no", "yes")),
        (["b", "a"], [source_labels("single", "a")], (), ("b", "a")),
        ("auto", [source_labels("single", "1", numbered=True), source_labels("single", "one")], (), ("1", "one")),
    ],
)
def test_label_names_are_resolved(
    setting: Any, train: list[SourceLabels], base: tuple[str, ...], names: tuple[str, ...]
):
    assert resolve_labels(setting, train, [], base=base).names == names


@pytest.mark.parametrize(
    ("setting", "train", "evaluation", "message"),
    [
        (
            "auto",
            [source_labels("single", "a"), source_labels("multi", "a")],
            [],
            "sources have different kinds of labels: multi and single",
        ),
        ("regression", [source_labels("single", "a")], [], "some rows have labels that are not numbers"),
        ("auto", [source_labels("single", "a")], [], "every training row has the label a"),
        (
            "auto",
            [source_labels("single", "a", "b")],
            [source_labels("single", "c")],
            "f.jsonl:1: label c: not one of the model's 2 labels",
        ),
        (
            ["a", "b"],
            [source_labels("single", "a", "z", "q")],
            [],
            "f.jsonl:2: label z and 1 more: not one of the model's 2 labels",
        ),
        (
            ["a", "b"],
            [source_labels("single", "0", "7", numbered=True)],
            [],
            "f.jsonl:2: label 7: not one of the model's 2 labels",
        ),
        (  # the training rows have names, so that class numbers in the evaluation rows would be guesses
            "auto",
            [source_labels("single", "no", "yes")],
            [source_labels("single", "0", "1", numbered=True)],
            "f.jsonl:1: label 0 and 1 more: not one of the model's 2 labels",
        ),
        (  # labels that count from 1: 0 is none of them
            ["1", "2", "3"],
            [source_labels("single", "1", "3", numbered=True)],
            [source_labels("single", "0", numbered=True)],
            "f.jsonl:1: label 0: not one of the model's 3 labels",
        ),
        ("auto", [source_labels("single", "0.5", "1.5")], [], "labels such as 0.5 look like regression values"),
        ("auto", [source_labels("single", "1", "123456", numbered=True)], [], "look like regression values"),
        ("auto", [source_labels("multi")], [], "no training row has a label"),
        (
            "auto",
            [source_labels("regression", width=1), source_labels("regression", width=2)],
            [],
            "rows have different numbers of values: 1 and 2",
        ),
    ],
)
def test_invalid_sets_of_labels_are_rejected(
    setting: Any, train: list[SourceLabels], evaluation: list[SourceLabels], message: str
):
    with pytest.raises(LoraError) as caught:
        resolve_labels(setting, train, evaluation)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_text_of_one_word_is_encoded():
    encoder = LabeledRowEncoder("seq-cls", DataSpec.model_validate({"train": "x"}), TOKENIZERS["bert"])
    (row,) = encoder.encode([ClassificationExample("fox", None, "x")])
    assert (row.label_keys, row.supervised, row.length) == (("x",), 1, len(row.ids))


USUAL_HINT = "hint: fix them, or set data.on_bad_row: skip to drop and count them"


@pytest.mark.parametrize(
    ("task", "rows", "expected_lines"),
    [
        ("seq-cls", ['{"text": "a", "label": null}'], ["train.jsonl:1: label: is null"]),
        ("seq-cls", ['{"text": "a", "label": {"x": 1}}'], ["train.jsonl:1: label: is an object, not a name or number"]),
        (
            "seq-cls",
            ['{"text": "a", "label": -1}'],
            ["train.jsonl:1: label: is -1, which marks a row without label"],
        ),
        (
            "seq-cls",
            ['{"text": "a", "label": ["x", null]}'],
            ["train.jsonl:1: label[1]: is null, not a name or number"],
        ),
        ("seq-cls", ['{"text": "a", "label": ""}'], ["train.jsonl:1: label: is empty"]),
        ("seq-cls", ['{"text": " ", "label": "x"}'], ["train.jsonl:1: text: is empty"]),
        (
            "seq-cls",
            ['{"text": "a", "text_pair": 3, "label": "x"}'],
            ["train.jsonl:1: text_pair: is a number, not a string"],
        ),
        (
            "seq-cls",
            ['{"text": "a", "label": "x"}', '{"text": "b", "label": ["x"]}', '{"text": "c", "label": 0.5}'],
            [
                "train.jsonl:2: label: is a list of labels, but earlier rows have a single label",
                "train.jsonl:3: label: is a regression value, but earlier rows have a single label",
            ],
        ),
        (
            "seq-cls",
            ['{"text": "a", "label": [0.5]}', '{"text": "b", "label": [0.5, 1.5]}'],
            ["train.jsonl:2: label: has 2 values, not 1"],
        ),
        (
            "token-cls",
            ['{"tokens": ["a", "b"], "tags": ["O"]}'],
            ["train.jsonl:1: tags: has 1 entries, but tokens has 2"],
        ),
        ("token-cls", ['{"tokens": ["a", ""], "tags": ["O", "O"]}'], ["train.jsonl:1: tokens[1]: is empty"]),
        (
            "token-cls",
            ['{"tokens": ["a", 3], "tags": ["O", "O"]}'],
            ["train.jsonl:1: tokens[1]: is a number, not a string"],
        ),
        ("token-cls", ['{"tokens": [], "tags": []}'], ["train.jsonl:1: tokens: is empty"]),
        ("token-cls", ['{"tokens": "a b", "tags": ["O"]}'], ["train.jsonl:1: tokens: is a string, but not valid JSON"]),
        (
            "seq2seq-lm",
            ['{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}'],
            ["train.jsonl:1: prompt: is a conversation, but task seq2seq-lm needs texts"],
        ),
        (
            "seq2seq-lm",
            ['{"prompt": "x", "completion": " "}'],
            ["train.jsonl:1: completion: is empty: there is nothing to learn from"],
        ),
        (
            "seq-cls",
            ['{"sentence": "a", "gold": 1}'],
            [
                "error: train.jsonl:1: no known format has these columns: sentence, gold",
                "hint: map them with data.columns, for example {text: sentence, label: class}",
            ],
        ),
    ],
)
def test_invalid_rows_of_the_task_are_rejected(
    task: Any, rows: list[str], expected_lines: list[str], prepared: Prepare
):
    with pytest.raises(LoraError) as caught:
        prepared(build_encoder("bert"), files={"train.jsonl": "\n".join(rows)}, task=task)
    error = caught.value
    shown = [*error.details, f"error: {error.message}", f"hint: {error.hint}"]
    assert (shown[:-2] if shown[-1] == USUAL_HINT else shown) == expected_lines


def test_a_regression_with_text_labels_is_rejected(prepared: Prepare):
    rows = lines([{"text": "a", "label": "good"}])
    with pytest.raises(LoraError) as caught:
        prepared(build_encoder("bert"), files={"train.jsonl": rows}, task="seq-cls", labels="regression")
    assert list(caught.value.details) == ["train.jsonl:1: label: is 'good', but a regression needs numbers"]


def test_integers_are_class_numbers_only_where_no_name_is_an_integer():
    numbers = source_labels("single", "0", "1", numbered=True)
    names = ClassLabels("single", ("no", "yes"))
    assert label_numbers(names, numbers) == {"no": 0, "yes": 1, "0": 0, "1": 1}
    assert label_notes(names, [numbers]) == ["f.jsonl:1: its integer labels are class numbers: 0 is no, 1 is yes"]
    shifted = ClassLabels("single", ("1", "2"))
    assert label_numbers(shifted, source_labels("single", "1", numbered=True)) == {"1": 0, "2": 1}
    assert label_notes(shifted, [source_labels("single", "1", numbered=True)]) == []


def test_labels_that_differ_only_in_case_or_spaces_are_told():
    train = [source_labels("single", "Yes", "yes ", "no")]
    labels = resolve_labels("auto", train, [])
    assert label_notes(labels, train) == [
        "labels 'Yes' and 'yes ' are different classes: they differ only in case or spaces"
    ]
    with pytest.raises(LoraError, match="label NO: not one of") as caught:
        resolve_labels(["yes", "no"], [source_labels("single", "yes", "NO")], [])
    assert caught.value.hint == "did you mean no? Upper case and spaces count"


@pytest.mark.parametrize("label", [1, "1"])
def test_class_numbers_of_a_named_head_are_told(label: object, prepared: Prepare):
    """As of a file of `lora eval --data`, where the labels are the names of the adapter's head."""
    told: list[str] = []
    rows = json.dumps({"text": "a", "label": label})
    data = prepared(
        build_encoder("bert"), files={"train.jsonl": rows}, task="seq-cls", labels=["no", "yes"], info=told.append
    )
    assert data.train[0].labels.tolist() == [1]
    assert "train.jsonl:1: its integer labels are class numbers: 0 is no, 1 is yes" in told
