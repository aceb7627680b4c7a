"""Figures for what a model answers, against one or several references: by the libraries that the field compares by."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from lora_cli.errors import LoraError

References = Sequence[Sequence[str]]  # those of each answer


class TextMetric(NamedTuple):
    """One entry; its value is between 0 and 1, or 0 and 100 where the field has it so."""

    summary: str
    compute: Callable[[Sequence[str], References], float]
    package: str = ""  # importable name of what the extra `eval` brings for it


def compute_text_metrics(names: Sequence[str], answers: Sequence[str], references: References) -> dict[str, float]:
    """The metrics `names` of `answers`, each with its references."""
    return {name: TEXT_METRICS[name].compute(answers, references) for name in names}


def check_text_metrics(names: Sequence[str]) -> None:
    """Refuse what is not known or not installed, before any model is loaded.

    Raises:
        LoraError: for the first such name.
    """
    for name in names:
        if name not in TEXT_METRICS:
            raise LoraError(f"--metric {name} is not known", hint=f"known are {', '.join(TEXT_METRICS)}")
        package = TEXT_METRICS[name].package
        if package and find_spec(package) is None:
            raise LoraError(f"--metric {name} needs the package {package}", hint='pip install "lora-cli[eval]"')


def _mean_of_best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> float:
    """Against several references the nearest counts."""
    best = [max(score(answer, each) for each in given) for answer, given in zip(answers, references, strict=True)]
    return sum(best) / max(1, len(best))


def _exact_match(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(lambda answer, reference: float(answer.strip() == reference.strip()), answers, references)


def _words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, without punctuation and articles (Rajpurkar et al., arXiv:1606.05250)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _word_f1(answer: str, reference: str) -> float:
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _f1(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_word_f1, answers, references)


def _rouge_l(answers: Sequence[str], references: References) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return _mean_of_best(lambda a, r: float(scorer.score(r, a)["rougeL"].fmeasure), answers, references)


def _reference_streams(references: References) -> list[list[str | None]]:
    """As sacrebleu takes them: the first reference of each answer, the second, and so on; None where there is none."""
    most = max(map(len, references))
    return [[given[i] if i < len(given) else None for given in references] for i in range(most)]


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
    """GSM8K's answer stands behind ####; without it, the last number counts (Cobbe et al., arXiv:2110.14168)."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def _same_number(answer: str, reference: str) -> float:
    found, wanted = _last_number(answer), _last_number(reference)
    return float(found is not None and found == wanted)


def _numeric_match(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_same_number, answers, references)


TEXT_METRICS: dict[str, TextMetric] = {
    "exact_match": TextMetric("share of answers that are a reference, to the letter", _exact_match),
    "f1": TextMetric("overlap of words with the nearest reference, as in SQuAD", _f1),
    "rouge": TextMetric("ROUGE-L F1 with the nearest reference", _rouge_l, "rouge_score"),
    "bleu": TextMetric("corpus BLEU, 0 to 100, with all references", _bleu, "sacrebleu"),
    "chrf": TextMetric("corpus chrF, 0 to 100, with all references", _chrf, "sacrebleu"),
    "json_valid": TextMetric("share of answers that are JSON", _json_valid),
    "numeric_match": TextMetric("share whose last number is a reference's, as in GSM8K", _numeric_match),
}
