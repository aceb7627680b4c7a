"""Metrics of generated text against one or several references: exact match, SQuAD F1, ROUGE, BLEU, chrF and others."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from lora_cli.errors import LoraError

References = Sequence[Sequence[str]]  # the references of each answer


class TextMetric(NamedTuple):
    """An entry of TEXT_METRICS; its value is in [0, 1], or in [0, 100] for BLEU and chrF."""

    summary: str
    compute: Callable[[Sequence[str], References], float]
    package: str = ""  # import name of the package in the extra `eval` that computes it


def compute_text_metrics(names: Sequence[str], answers: Sequence[str], references: References) -> dict[str, float]:
    """Return the metrics `names` of `answers`; `references[i]` are the references of `answers[i]`."""
    return {name: TEXT_METRICS[name].compute(answers, references) for name in names}


def check_text_metrics(names: Sequence[str]) -> None:
    """Check `names` before any model is loaded.

    Raises:
        LoraError: a metric is unknown, or its package is not installed.
    """
    for name in names:
        if name not in TEXT_METRICS:
            raise LoraError(f"--metric {name} is not known", hint=f"use one of {', '.join(TEXT_METRICS)}")
        package = TEXT_METRICS[name].package
        if package and find_spec(package) is None:
            raise LoraError(f"--metric {name} needs the package {package}", hint='pip install "lora-cli[eval]"')


def _mean_of_best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> float:
    """Return the mean over the answers of the best score against any of their references."""
    best = [max(score(answer, ref) for ref in refs) for answer, refs in zip(answers, references, strict=True)]
    return sum(best) / max(1, len(best))


def _exact_match(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(lambda answer, reference: float(answer.strip() == reference.strip()), answers, references)


def _squad_words(text: str) -> list[str]:
    """Return the words after SQuAD's normalization: lower case, no punctuation, no articles (arXiv:1606.05250)."""
    without_punctuation = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def _word_f1(answer: str, reference: str) -> float:
    predicted, expected = _squad_words(answer), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def _f1(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_word_f1, answers, references)


def _rouge_l(answers: Sequence[str], references: References) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return _mean_of_best(lambda a, r: float(scorer.score(r, a)["rougeL"].fmeasure), answers, references)


def _reference_streams(references: References) -> list[list[str | None]]:
    """Transpose to sacrebleu's layout: the first reference of each answer, then the second, ...; None if missing."""
    count = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(count)]


def _bleu(answers: Sequence[str], references: References) -> float:
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), _reference_streams(references)).score)


def _chrf(answers: Sequence[str], references: References) -> float:
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), _reference_streams(references)).score)


def _json_valid(answers: Sequence[str], _: References) -> float:
    return sum(map(_is_json, answers)) / max(1, len(answers))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _last_number(text: str) -> float | None:
    """Return the last number; text before `####` is ignored, as in GSM8K (Cobbe et al., arXiv:2110.14168)."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def _same_number(answer: str, reference: str) -> float:
    predicted, expected = _last_number(answer), _last_number(reference)
    return float(predicted is not None and predicted == expected)


def _numeric_match(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_same_number, answers, references)


TEXT_METRICS: dict[str, TextMetric] = {
    "exact_match": TextMetric("share of answers that equal a reference exactly", _exact_match),
    "f1": TextMetric("word F1 with the best matching reference, as in SQuAD", _f1),
    "rouge": TextMetric("ROUGE-L F1 with the best matching reference", _rouge_l, "rouge_score"),
    "bleu": TextMetric("corpus BLEU, 0 to 100, with all references", _bleu, "sacrebleu"),
    "chrf": TextMetric("corpus chrF, 0 to 100, with all references", _chrf, "sacrebleu"),
    "json_valid": TextMetric("share of answers that are valid JSON", _json_valid),
    "numeric_match": TextMetric("share of answers whose last number equals a reference's, as in GSM8K", _numeric_match),
}
