"""Labels exact: each class, tag and target is that of its row, at its token, under its number; the rest is refused."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_cli.data.class_labels import ClassLabels, SourceLabels, resolve_labels
from lora_cli.data.dataset import IGNORE_INDEX
from lora_cli.data.encode_classes import LabeledRowEncoder
from lora_cli.data.formats import ClassificationExample, TaggingExample
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


def test_a_class_is_the_rows_and_the_ids_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"text": f"the fox {i}", "label": ["dog", "ant", "cat"][i % 3]} for i in range(7)]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls")
    assert data.labels == ClassLabels("single", ("ant", "cat", "dog"))
    for row, given_ in zip(data.train, rows, strict=True):
        assert row.input_ids.tolist() == tokenizer(given_["text"])["input_ids"]
        assert data.labels.names[int(row.labels[0])] == given_["label"]
        assert row.labels.dtype == np.int32
    assert data.ledger.train.supervised == 7
    assert "  labels: dog 3 (42.9%), ant 2 (28.6%), cat 2 (28.6%)" in data.ledger.table()


def test_a_pair_is_the_tokenizers_own_with_its_types(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"text": "the fox", "text_pair": "lazy dog", "label": 1}, {"text": "a", "label": 0}]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls")
    whole = tokenizer("the fox", "lazy dog", return_token_type_ids=True)
    assert data.train[0].input_ids.tolist() == whole["input_ids"]
    assert data.train[0].pair_tokens == sum(whole["token_type_ids"])
    assert data.train[1].pair_tokens == 0


@pytest.mark.parametrize(
    ("given_", "labels", "wanted"),
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
def test_labels_are_of_the_kind_that_rows_write(given_: list[Any], labels: ClassLabels, wanted: Any, prepared: Prepare):
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate(given_)]
    data = prepared(build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls")
    assert data.labels == labels
    assert [row.labels.tolist() for row in data.train] == wanted


def test_whole_numbers_are_measures_where_the_recipe_says_so(prepared: Prepare):
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate([3, 1.5, "2"])]
    data = prepared(build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls", labels="regression")
    assert [row.labels.tolist() for row in data.train] == [[3.0], [1.5], [2.0]]


def test_the_recipe_names_labels_in_their_order_and_numbers_mean_it(prepared: Prepare):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    data = prepared(
        build_encoder("bert"), files={"train.jsonl": lines(rows)}, task="seq-cls", labels=["zebra", "ant", "cow"]
    )
    assert data.labels == ClassLabels("single", ("zebra", "ant", "cow"))
    assert [int(row.labels[0]) for row in data.train] == [1, 0]


def test_sources_number_their_labels_each_and_the_run_as_one(prepared: Prepare):
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
    if isinstance(row, BadRow):  # a character that this small alphabet has no token for, say
        assert row.reason == "word without token"
        return
    tokenizer = TOKENIZERS[kind]
    encoding = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert row.ids.tolist() == encoding["input_ids"]
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    found = [
        (int(label.removeprefix("tag")), encoding["offset_mapping"][i])
        for i, label in enumerate(row.label_keys)
        if label
    ]
    assert [number for number, _ in found] == list(range(len(words)))
    for number, (start, stop) in found:
        # The token reaches into its word, and none before it does.
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


def test_tags_become_labels_at_their_tokens_and_nothing_elsewhere(prepared: Prepare):
    rows = [{"tokens": ["The", "capital", "jumps"], "tags": ["O", "B-LOC", "O"]}]
    tokenizer = build_encoder("bert")
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="token-cls")
    assert data.labels == ClassLabels("single", ("B-LOC", "O"))
    (row,) = data.train
    words = tokenizer("The capital jumps").word_ids()
    marks = [data.labels.names[label] for label in row.labels if label != IGNORE_INDEX]
    assert marks == ["O", "B-LOC", "O"]
    assert row.labels[0] == row.labels[-1] == IGNORE_INDEX  # [CLS] and [SEP]
    assert len(row.labels) == len(words)


def test_a_target_is_what_the_tokenizer_makes_of_it(tokenizer: PreTrainedTokenizerFast, prepared: Prepare):
    rows = [{"prompt": "the fox", "completion": "LAZY"}, {"prompt": "dog", "completion": "x y z"}]
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq2seq-lm")
    for row, given_ in zip(data.train, rows, strict=True):
        assert row.input_ids.tolist() == tokenizer(given_["prompt"])["input_ids"]
        assert row.labels.tolist() == tokenizer(given_["completion"])["input_ids"]
    assert data.labels is None


def test_a_cut_row_keeps_its_end_token_and_is_counted(prepared: Prepare):
    tokenizer = build_encoder("bert")
    rows = [{"text": "the quick brown fox jumps " * 5, "label": "a"}, {"text": "fox", "label": "b"}]
    cut = {"overlong": "truncate", "max_length": 8, "max_loss": 0.0}
    data = prepared(tokenizer, files={"train.jsonl": lines(rows)}, task="seq-cls", **cut)
    ids = data.train[0].input_ids.tolist()
    assert ids == tokenizer(rows[0]["text"], truncation=True, max_length=8)["input_ids"]
    assert ids[-1] == tokenizer.sep_token_id
    assert "  1 row cut at data.max_length" in data.ledger.table()
    tagged = [{"tokens": ["the", "fox"] * 20, "tags": ["O", "X"] * 20}]
    data = prepared(tokenizer, files={"train.jsonl": lines(tagged)}, task="token-cls", **cut)
    assert len(data.train[0].input_ids) == 8
    left = data.ledger.train.supervised
    assert f"  {40 - left} labels or target tokens lost with the end of their row" in data.ledger.table()


def test_the_cache_knows_the_task(prepared: Prepare):
    rows = lines([{"text": "the fox", "label": 1.5}, {"text": "dog", "label": 2.5}])
    tokenizer = build_encoder("bert")
    first = prepared(tokenizer, files={"train.jsonl": rows}, task="seq-cls")
    assert first.labels.kind == "regression"
    said: list[str] = []
    again = prepared(tokenizer, task="seq-cls", info=said.append)
    assert said == []
    assert [row.labels.tolist() for row in again.train] == [row.labels.tolist() for row in first.train]
    assert again.fingerprint == first.fingerprint


def test_another_label_is_another_run(prepared: Prepare):
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


def found(kind: str, *labels: str, numbered: bool = False, width: int = 1) -> SourceLabels:
    return SourceLabels(
        kind,
        dict.fromkeys(labels, 1),
        {label: f"f.jsonl:{i}" for i, label in enumerate(labels, 1)},
        numbered,
        width,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "train", "base", "names"),
    [
        ("auto", [found("single", "b", "a")], (), ("a", "b")),
        ("auto", [found("single", "b", "a")], ("b", "c", "a"), ("b", "c", "a")),  # the base's own head knows them
        ("auto", [found("single", "b", "x")], ("b", "c", "a"), ("b", "x")),
        ("auto", [found("single", "3", "1", numbered=True)], (), ("0", "1", "2", "3")),
        ("auto", [found("single", "1", "0", numbered=True)], ("no", "yes"), ("no", "yes")),
        (["b", "a"], [found("single", "a")], (), ("b", "a")),
        ("auto", [found("single", "1", numbered=True), found("single", "one")], (), ("1", "one")),
    ],
)
def test_names_are_settled(wanted: Any, train: list[SourceLabels], base: tuple[str, ...], names: tuple[str, ...]):
    assert resolve_labels(wanted, train, [], base=base).names == names


@pytest.mark.parametrize(
    ("wanted", "train", "evaluation", "said"),
    [
        (
            "auto",
            [found("single", "a"), found("multi", "a")],
            [],
            "sources disagree on what a label is: multi and single",
        ),
        ("regression", [found("single", "a")], [], "some rows have labels that are no numbers"),
        ("auto", [found("single", "a")], [], "every training row has the label a"),
        (
            "auto",
            [found("single", "a", "b")],
            [found("single", "c")],
            "f.jsonl:1: label c: not among the 2 of the head",
        ),
        (
            ["a", "b"],
            [found("single", "a", "z", "q")],
            [],
            "f.jsonl:2: label z and 1 more: not among the 2 of the head",
        ),
        (["a", "b"], [found("single", "0", "7", numbered=True)], [], "f.jsonl:2: label 7: not among the 2 of the head"),
        ("auto", [found("single", "0.5", "1.5")], [], "labels such as 0.5 look like measured numbers"),
        ("auto", [found("single", "1", "123456", numbered=True)], [], "look like measured numbers"),
        ("auto", [found("multi")], [], "no training row has a label"),
        ("auto", [found("regression", width=1), found("regression", width=2)], [], "rows of 1 and 2 values"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(
    wanted: Any, train: list[SourceLabels], evaluation: list[SourceLabels], said: str
):
    with pytest.raises(LoraError) as refused:
        resolve_labels(wanted, train, evaluation)
    assert said in refused.value.message
    assert refused.value.hint


def test_one_word_classifies_as_it_is_read():
    encoder = LabeledRowEncoder("seq-cls", DataSpec.model_validate({"train": "x"}), TOKENIZERS["bert"])
    (row,) = encoder.encode([ClassificationExample("fox", None, "x")])
    assert (row.label_keys, row.supervised, row.length) == (("x",), 1, len(row.ids))


SEEN = "hint: mend them, or set data.on_bad_row: skip to leave them out, counted"


@pytest.mark.parametrize(
    ("task", "rows", "lines_"),
    [
        ("seq-cls", ['{"text": "a", "label": null}'], ["train.jsonl:1: label: is null"]),
        ("seq-cls", ['{"text": "a", "label": {"x": 1}}'], ["train.jsonl:1: label: is an object, not a name or number"]),
        (
            "seq-cls",
            ['{"text": "a", "label": -1}'],
            ["train.jsonl:1: label: is -1, which stands for a row without label"],
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
                "train.jsonl:2: label: is a list of labels, and in rows before it one label",
                "train.jsonl:3: label: is a number to come near to, and in rows before it one label",
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
            ["train.jsonl:1: tags: has 1 entries where tokens has 2"],
        ),
        ("token-cls", ['{"tokens": ["a", ""], "tags": ["O", "O"]}'], ["train.jsonl:1: tokens[1]: is empty"]),
        (
            "token-cls",
            ['{"tokens": ["a", 3], "tags": ["O", "O"]}'],
            ["train.jsonl:1: tokens[1]: is a number, not a string"],
        ),
        ("token-cls", ['{"tokens": [], "tags": []}'], ["train.jsonl:1: tokens: is empty"]),
        ("token-cls", ['{"tokens": "a b", "tags": ["O"]}'], ["train.jsonl:1: tokens: is a string that is no JSON"]),
        (
            "seq2seq-lm",
            ['{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}'],
            ["train.jsonl:1: prompt: is a conversation; task seq2seq-lm reads texts"],
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
                "hint: map them, as in data.columns: {text: sentence, label: class}",
            ],
        ),
    ],
)
def test_what_is_no_row_of_the_task_is_refused(task: Any, rows: list[str], lines_: list[str], prepared: Prepare):
    with pytest.raises(LoraError) as refused:
        prepared(build_encoder("bert"), files={"train.jsonl": "\n".join(rows)}, task=task)
    error = refused.value
    shown = [*error.details, f"error: {error.message}", f"hint: {error.hint}"]
    assert (shown[:-2] if shown[-1] == SEEN else shown) == lines_


def test_a_regression_of_words_is_refused(prepared: Prepare):
    rows = lines([{"text": "a", "label": "good"}])
    with pytest.raises(LoraError) as refused:
        prepared(build_encoder("bert"), files={"train.jsonl": rows}, task="seq-cls", labels="regression")
    assert list(refused.value.details) == ["train.jsonl:1: label: is 'good', where a regression has numbers"]
