"""Metrics of generated text, against their definitions and against the libraries."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU, corpus_bleu, corpus_chrf

from lora_cli.errors import LoraError
from lora_cli.evaluation import text_metrics
from lora_cli.evaluation.numbers import last_number
from lora_cli.evaluation.words import split_words

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


ENGLISH = ["The cat's “new” hat – it cost $3.50…", "well-known (e.g. A.I.) isn't\nbad &amp; <b>", "a_b 12,000 x2"]


@pytest.mark.parametrize("answer", ENGLISH)
@pytest.mark.parametrize("reference", ENGLISH)
def test_figures_of_english_are_those_of_the_libraries(answer: str, reference: str):
    answers, references = [answer, ENGLISH[0]], [[reference, ENGLISH[1]], [ENGLISH[2]]]
    found = text_metrics.compute_text_metrics(["rouge", "bleu", "chrf"], answers, references)
    scorer = RougeScorer(["rougeL"])
    rouge = [
        max(scorer.score(r, a)["rougeL"].fmeasure for r in refs) for a, refs in zip(answers, references, strict=True)
    ]
    streams = [[reference, ENGLISH[2]], [ENGLISH[1], None]]
    assert found["rouge"] == sum(rouge) / 2
    assert found["bleu"] == corpus_bleu(answers, streams).score
    assert found["chrf"] == corpus_chrf(answers, streams).score


@given(text=st.text(st.characters(codec="ascii"), max_size=60))
def test_words_of_ascii_text_are_those_of_rouge_score(text: str):
    assert split_words(text) == RougeScorer(["rougeL"])._tokenizer.tokenize(text)


TEXTS = {
    "Chinese": "今天天气很好，我们去公园散步。",
    "Japanese": "今日は天気がいいですね。ﾃｽﾄ",
    "Korean": "안녕하세요 오늘 날씨가 좋네요 정말 그래요",
    "Arabic": "السلام عليكم ورحمة الله وبركاته",
    "Persian": "من می‌خواهم به خانه بروم",
    "Hindi": "नमस्ते दुनिया आज मौसम अच्छा है",
    "Thai": "สวัสดีชาวโลกวันนี้อากาศดี",
    "Khmer": "សួស្តីពិភពលោក",
    "Russian": "Привет мир, сегодня хорошая погода",
    "Greek": "Γειά σου Κόσμε, πώς είσαι σήμερα;",
    "French": "L'été à la plage où Zoë a mangé",
}


@pytest.mark.parametrize("language", TEXTS)
def test_equal_texts_have_full_marks_in_every_script(language: str):
    text = TEXTS[language]
    names = ["exact_match", "f1", "rouge", "bleu", "chrf"]
    assert list(text_metrics.compute_text_metrics(names, [text], [[text]]).values()) == pytest.approx(
        [1, 1, 1, 100, 100]
    )
    half = text[: len(text) // 2]
    part = text_metrics.compute_text_metrics(names, [half], [[text]])
    assert part["exact_match"] == 0
    assert 0 < part["rouge"] < 1
    assert 0 < part["f1"] < 1
    assert text_metrics.compute_text_metrics(["rouge", "f1"], ["hello"], [[text]]) == {"rouge": 0, "f1": 0}


def test_composed_and_decomposed_accents_are_equal():
    composed, decomposed = "caf\u00e9 \u1ec7", "cafe\u0301 e\u0323\u0302"
    found = text_metrics.compute_text_metrics(["exact_match", "f1", "rouge"], [composed], [[decomposed]])
    assert list(found.values()) == [1, 1, 1]
    assert split_words("İstanbul क्षि می\u200cخواهم") == ["i̇stanbul", "क्षि", "می\u200cخواهم".replace("\u200c", "")]


def test_signatures_name_the_tokenizer():
    signatures = {
        language: text_metrics.metric_signatures(["rouge", "bleu", "chrf"], [[text]])
        for language, text in TEXTS.items()
    }
    assert "tok:words of Unicode letters, Han by character|" in signatures["Chinese"]["rouge"]
    assert "|tok:zh|" in signatures["Chinese"]["bleu"]
    assert "|tok:13a, Han and Kana by character|" in signatures["Japanese"]["bleu"]
    assert "|tok:13a|" in signatures["Russian"]["bleu"]
    english = text_metrics.metric_signatures(["rouge", "bleu"], [["one two three four"], ["five"]])
    assert "tok:rouge-score's own" in english["rouge"]
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])
    assert english["bleu"] == str(metric.get_signature())
    assert text_metrics.metric_signatures(["bleu"], [["yes"], ["no"]])["bleu"].endswith(
        "no reference has 4 words: use chrf"
    )


def test_chinese_bleu_is_that_of_sacrebleu():
    answers, references = ["今天天气不好，我们去散步。"], [[TEXTS["Chinese"]]]
    expected = corpus_bleu(answers, [[TEXTS["Chinese"]]], tokenize="zh").score
    assert text_metrics.compute_text_metrics(["bleu"], answers, references)["bleu"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e5", ["100000"]),
        ("1.5E-3", ["0.0015"]),
        ("2 x 10^5", ["200000"]),
        ("2×10⁻⁵", ["0.00002"]),
        ("1,000.50", ["1000.5"]),
        ("1.000,50", ["1000.5"]),
        ("1,000", ["1000"]),
        ("1.000", ["1"]),
        ("1.000.000", ["1000000"]),
        ("1,5", ["1.5"]),
        ("0,001", ["0.001"]),
        ("12,34,567", ["1234567"]),
        ("1 000 000", ["1000000"]),
        ("1\u202f000,5 kg", ["1000.5"]),
        ("1'000'000", ["1000000"]),
        ("1,2,3", ["3"]),
        ("3-4", ["3", "4"]),
        ("3–4", ["3", "4"]),
        ("2024-01-05", ["2024", "1", "5"]),
        ("5/1/2024", ["5", "1", "2024"]),
        ("7 - 4", ["4"]),
        ("GPT-4", ["4"]),
        ("(3)-4", ["4"]),
        ("x = −5", ["-5"]),
        ("-$4", ["-4"]),
        ("€-4", ["-4"]),
        ("1/2", ["0.5"]),
        ("-1 1/2", ["-1.5"]),
        ("1½", ["1.5"]),
        (r"\frac{3}{4}", ["0.75"]),
        ("1/0", ["1"]),
        (".5", ["0.5"]),
        ("The answer is 5.", ["5"]),
        ("5 m²", ["5"]),
        ("１２３．５", ["123.5"]),
        ("١٬٢٣٤٫٥", ["1234.5"]),
        ("१२", ["12"]),
        ("9" * 5000, ["9" * 5000]),
        ("-" + "9" * 5000, ["-" + "9" * 5000]),
        ("1e99999999999", ["1e9999"]),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_are_read_in_every_notation(text: str, expected: list[str] | None):
    found = last_number(text)
    assert (found and list(found.values)) == (expected and [Decimal(each) for each in expected])


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("50%", "50", 1),
        ("50 percent", "0.5", 1),
        ("50%", "5000%", 0),
        ("3-4", "4", 0),
        ("3-4", "3 – 4", 0),
        ("1/2", ".5", 1),
    ],
)
def test_numeric_match_of_percentages_ranges_and_fractions(answer: str, reference: str, same: int):
    assert text_metrics.compute_text_metrics(["numeric_match"], [answer], [[reference]])["numeric_match"] == same


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("0123456789.,-+/eE %$x^'# \u00bd\u2212\u0661½{}\\frac"), max_size=20))
def test_any_text_has_a_number_or_none(text: str):
    found = last_number(text)
    assert found is None or all(value.is_finite() for value in found.values)


@pytest.mark.parametrize(
    ("text", "valid"),
    [("NaN", 0), ('{"a": Infinity}', 0), ("[" * 100_000, 0), ("1" * 5000, 1), ('{"ключ": "值"}', 1)],
)
def test_json_is_the_standard_not_pythons(text: str, valid: int):
    assert text_metrics.compute_text_metrics(["json_valid"], [text], [[""]])["json_valid"] == valid
