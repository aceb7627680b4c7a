"""Figures for what a classifier says, by the libraries that the field compares by (extra: eval)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from lora_cli.evaluation.predict import Predictions

PACKAGES = ("sklearn", "scipy", "seqeval")  # importable names of what `pip install "lora-cli[eval]"` brings


class ClassificationMetric(NamedTuple):
    """One entry."""

    applies: Callable[[Predictions], bool]
    compute: Callable[[Predictions], float]


def missing_packages() -> list[str]:
    """Packages of the extra that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def compute_classification_metrics(outcome: Predictions) -> dict[str, float]:
    """Every metric that applies, by name; NaN where it is not defined, as a correlation of constants is."""
    return {
        name: float(metric.compute(outcome))
        for name, metric in CLASSIFICATION_METRICS.items()
        if metric.applies(outcome)
    }


def _macro_f1(outcome: Predictions) -> float:
    from sklearn.metrics import f1_score

    # Over the labels that are there or were said: one that is neither has no F1.
    found: float = f1_score(outcome.wanted, outcome.predicted, average="macro", zero_division=0.0)
    return found


def _micro_f1(outcome: Predictions) -> float:
    from sklearn.metrics import f1_score

    found: float = f1_score(outcome.wanted, outcome.predicted, average="micro", zero_division=0.0)
    return found


def _matthews(outcome: Predictions) -> float:
    from sklearn.metrics import matthews_corrcoef

    found: float = matthews_corrcoef(outcome.wanted, outcome.predicted)
    return found


def _pearson(outcome: Predictions) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(outcome.wanted[:, 0], outcome.predicted[:, 0]).statistic)


def _spearman(outcome: Predictions) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(outcome.wanted[:, 0], outcome.predicted[:, 0]).statistic)


def _entity_f1(outcome: Predictions) -> float:
    from seqeval.metrics import f1_score

    starts = np.flatnonzero(np.diff(outcome.row, prepend=-1))
    names = np.array(outcome.names)
    wanted, predicted = (
        [part.tolist() for part in np.split(names[side.astype(int)], starts[1:])]
        for side in (outcome.wanted, outcome.predicted)
    )
    return float(f1_score(wanted, predicted, zero_division=0))


def _is_single(outcome: Predictions) -> bool:
    return outcome.kind == "single"


def _is_multi(outcome: Predictions) -> bool:
    return outcome.kind == "multi"


def _is_one_value(outcome: Predictions) -> bool:
    return outcome.kind == "regression" and outcome.wanted.shape[1] == 1 and len(outcome.wanted) > 1


def _has_entities(outcome: Predictions) -> bool:
    """Tags of the kind B-PER, I-PER, O."""
    return outcome.kind == "single" and any(name.startswith("B-") for name in outcome.names) and "O" in outcome.names


def _is_class_of_a_row(outcome: Predictions) -> bool:
    return _is_single(outcome) and bool((np.diff(outcome.row) == 1).all())


CLASSIFICATION_METRICS: dict[str, ClassificationMetric] = {
    "macro_f1": ClassificationMetric(lambda outcome: outcome.kind != "regression", _macro_f1),
    "micro_f1": ClassificationMetric(_is_multi, _micro_f1),
    "mcc": ClassificationMetric(_is_class_of_a_row, _matthews),
    "entity_f1": ClassificationMetric(_has_entities, _entity_f1),
    "pearson": ClassificationMetric(_is_one_value, _pearson),
    "spearman": ClassificationMetric(_is_one_value, _spearman),
}
