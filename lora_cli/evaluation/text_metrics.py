"""Metrics of generated text against one or several references: exact match, SQuAD F1, ROUGE, BLEU, chrF and others."""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.evaluation.numbers import last_number, same_number
from lora_cli.evaluation.words import (
    scripts_without_spaces,
    separate_characters,
    split_words,
)

NGRAMS = 4  # BLEU's longest
References = Sequence[Sequence[str]]  # the references of each answer


class TextMetric(NamedTuple):
    """An entry of TEXT_METRICS; its value is in [0, 1], or in [0, 100] for BLEU and chrF."""

    summary: str
    compute: Callable[[Sequence[str], References], float]
    package: str = ""  # import name of the package in the extra `eval` that computes it
    signature: Callable[[References], str] | None = None  # the tokenizer and version that the references need


def compute_text_metrics(names: Sequence[str], answers: Sequence[str], references: References) -> dict[str, float]:
    """Return the metrics `names` of `answers`; `references[i]` are the references of `answers[i]`."""
    return {name: TEXT_METRICS[name].compute(answers, references) for name in names}


def metric_signatures(names: Sequence[str], references: References) -> dict[str, str]:
    """Return how each of the metrics `names` that has a tokenizer splits these texts, with the library's version."""
    signatures = {name: TEXT_METRICS[name].signature for name in names}
    return {name: signature(references) for name, signature in signatures.items() if signature is not None}


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
    return _mean_of_best(
        lambda answer, reference: float(_composed(answer) == _composed(reference)), answers, references
    )


def _composed(text: str) -> str:
    """Return the text without outer spaces, with each letter and its accents as one character (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


def _squad_words(text: str) -> list[str]:
    """Return the words after SQuAD's normalization: lower case, no punctuation, no articles (arXiv:1606.05250).

    Of other scripts, as in MLQA (arXiv:1910.07475): Unicode's punctuation is removed too, and characters of scripts
    without spaces are words.
    """
    composed = unicodedata.normalize("NFC", text.lower())
    without_punctuation = "".join(c for c in composed if not _is_punctuation(c))
    if not without_punctuation.isascii():
        without_punctuation = separate_characters(without_punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or (not character.isascii() and unicodedata.category(character)[0] == "P")


def _word_f1(answer: str, reference: str) -> float:
    predicted, expected = _squad_words(answer), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def _f1(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_word_f1, answers, references)


class _WordTokenizer:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _rouge_l(answers: Sequence[str], references: References) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    return _mean_of_best(lambda a, r: float(scorer.score(r, a)["rougeL"].fmeasure), answers, references)


def _rouge_signature(references: References) -> str:
    texts = list(chain.from_iterable(references))
    tokenizer = "rouge-score's own" if all(map(str.isascii, texts)) else "words of Unicode letters"
    if scripts := scripts_without_spaces(texts):
        tokenizer += f", {' and '.join(scripts)} by character"
    return f"rougeL|tok:{tokenizer}|stemmer:no|version:{version('rouge-score')}"


def _reference_streams(references: References) -> list[list[str | None]]:
    """Transpose to sacrebleu's layout: the first reference of each answer, then the second, ...; None if missing."""
    count = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(count)]


def _bleu(answers: Sequence[str], references: References) -> float:
    """Return corpus BLEU with sacrebleu's tokenizer for the script of the references.

    sacrebleu's tokenizers for Japanese and Korean need dictionaries, and its `flores200` a download. Scripts without
    spaces are therefore split into characters before `13a`, the default, splits the rest.
    """
    from sacrebleu import BLEU

    tokenizer = _bleu_tokenizer(references)
    if tokenizer.separates_characters:
        answers = [separate_characters(answer) for answer in answers]
        references = [[separate_characters(reference) for reference in refs] for refs in references]
    return float(BLEU(tokenize=tokenizer.name).corpus_score(list(answers), _reference_streams(references)).score)


class _BleuTokenizer(NamedTuple):
    name: str  # sacrebleu's
    separates_characters: bool  # of scripts without spaces, before


def _bleu_tokenizer(references: References) -> _BleuTokenizer:
    scripts = scripts_without_spaces(chain.from_iterable(references))
    return _BleuTokenizer("zh" if scripts == ["Han"] else "13a", separates_characters=scripts not in ([], ["Han"]))


def _bleu_signature(references: References) -> str:
    """Return sacrebleu's signature, with the scripts that are split into characters."""
    from sacrebleu import BLEU

    metric = BLEU(tokenize=_bleu_tokenizer(references).name)
    texts = list(chain.from_iterable(references))
    scripts = f", {' and '.join(scripts_without_spaces(texts))} by character"
    separated = _bleu_tokenizer(references).separates_characters
    words = [metric.tokenizer(separate_characters(text) if separated else text).split() for text in texts]
    counts = {len(refs) for refs in references}
    number = str(counts.pop()) if len(counts) == 1 else "var"
    tokenizer = _bleu_tokenizer(references).name + (scripts if separated else "")
    note = "" if any(len(each) >= NGRAMS for each in words) else "; 0, because no reference has 4 words: use chrf"
    return f"nrefs:{number}|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:{version('sacrebleu')}{note}"


def _chrf(answers: Sequence[str], references: References) -> float:
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), _reference_streams(references)).score)


def _json_valid(answers: Sequence[str], _: References) -> float:
    return sum(map(_is_json, answers)) / max(1, len(answers))


def _is_json(text: str) -> bool:
    try:
        # Python reads NaN and Infinity, which JSON does not have; as text, an integer of any length is valid.
        json.loads(text, parse_constant=_refuse_constant, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _has_same_number(answer: str, reference: str) -> float:
    predicted, expected = last_number(answer), last_number(reference)
    return float(predicted is not None and expected is not None and same_number(predicted, expected))


def _numeric_match(answers: Sequence[str], references: References) -> float:
    return _mean_of_best(_has_same_number, answers, references)


TEXT_METRICS: dict[str, TextMetric] = {
    "exact_match": TextMetric("share of answers that equal a reference exactly", _exact_match),
    "f1": TextMetric("word F1 with the best matching reference, as in SQuAD", _f1),
    "rouge": TextMetric("ROUGE-L F1 with the best matching reference", _rouge_l, "rouge_score", _rouge_signature),
    "bleu": TextMetric("corpus BLEU, 0 to 100, with all references", _bleu, "sacrebleu", _bleu_signature),
    "chrf": TextMetric("corpus chrF, 0 to 100, with all references", _chrf, "sacrebleu"),
    "json_valid": TextMetric("share of answers that are valid JSON", _json_valid),
    "numeric_match": TextMetric("share of answers whose last number equals a reference's, as in GSM8K", _numeric_match),
}
