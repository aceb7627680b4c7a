"""Figures of answers: by their definitions, and as the libraries have them."""

import pytest

from lora_cli.errors import LoraError
from lora_cli.evaluation import text_metrics

ANSWERS = ["the cat sat", "42", '{"a": 1}', "no"]
REFERENCES = [["the cat sat", "a cat"], ["41", "It is 42."], ['{"a": 2}'], ["yes"]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exact_match", 1 / 4),
        ("json_valid", 2 / 4),  # 42 is JSON too
        ("numeric_match", 1 / 4),
        # Articles do not count: 1 for the first; one of one and of three words; two of two: "a 1" has no article left.
        ("f1", (1 + 2 * 1 / (1 + 3) + 0 + 0) / 4),
    ],
)
def test_by_their_definitions(name: str, value: float):
    assert text_metrics.compute_text_metrics([name], ANSWERS, REFERENCES) == {name: pytest.approx(value)}


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("so 3 + 4 = 7 #### 7", "#### 7", True),
        ("The answer is 1,234.50", "#### 1234.5", True),
        ("-3", "#### 3", False),
        ("none", "#### 3", False),
        ("#### 12 apples", "it takes 5 and 7 #### 12", True),
    ],
)
def test_the_number_that_an_answer_ends_in(answer: str, reference: str, same: bool):
    assert text_metrics.compute_text_metrics(["numeric_match"], [answer], [[reference]])["numeric_match"] == float(same)


def test_all_references_count_where_there_are_several():
    answers = ["the cat sat on the mat in the sun", "a dog barked at the moon last night"]
    one = [["a cat was lying on a mat in sunshine"], ["a dog barked at the moon last night"]]
    two = [[*one[0], answers[0]], one[1]]
    for name in ("bleu", "chrf", "rouge"):
        best = text_metrics.compute_text_metrics([name], answers, two)[name]
        assert best == pytest.approx(100.0 if name != "rouge" else 1.0)
        assert text_metrics.compute_text_metrics([name], answers, one)[name] < best
        assert text_metrics.compute_text_metrics([name], answers, [answers[:1] * 2, answers[1:]])[
            name
        ] == pytest.approx(best)


def test_a_name_that_is_none_and_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LoraError, match="--metric blue is not known") as caught:
        text_metrics.check_text_metrics(["blue"])
    assert "bleu" in str(caught.value.hint)
    monkeypatch.setattr(text_metrics, "find_spec", lambda package: None)
    text_metrics.check_text_metrics(["exact_match"])
    with pytest.raises(LoraError, match="--metric bleu needs the package sacrebleu"):
        text_metrics.check_text_metrics(["bleu"])
