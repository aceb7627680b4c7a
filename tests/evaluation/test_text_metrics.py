"""Metrics of generated text, against their definitions and against the libraries."""

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
        # The answers score 1; 0.5 (one common word, of one and of three); 0, as the article "a" is removed; and 0.
        ("f1", (1 + 2 * 1 / (1 + 3) + 0 + 0) / 4),
    ],
)
def test_metrics_follow_their_definitions(name: str, value: float):
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
def test_numeric_match_compares_the_last_numbers(answer: str, reference: str, same: bool):
    assert text_metrics.compute_text_metrics(["numeric_match"], [answer], [[reference]])["numeric_match"] == float(same)


def test_a_metric_uses_all_references_of_an_answer():
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


def test_an_unknown_metric_and_a_missing_package_are_errors(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LoraError, match="--metric blue is not known") as caught:
        text_metrics.check_text_metrics(["blue"])
    assert "bleu" in str(caught.value.hint)
    monkeypatch.setattr(text_metrics, "find_spec", lambda package: None)
    text_metrics.check_text_metrics(["exact_match"])
    with pytest.raises(LoraError, match="--metric bleu needs the package sacrebleu"):
        text_metrics.check_text_metrics(["bleu"])
