"""Classification metrics (F1, MCC, entity F1, correlations) by scikit-learn, scipy and seqeval (extra: eval)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from lora_cli.evaluation.predict import Predictions

PACKAGES = ("sklearn", "scipy", "seqeval")  # import names of the packages in the extra `lora-cli[eval]`


class ClassificationMetric(NamedTuple):
    """An entry of CLASSIFICATION_METRICS."""

    applies: Callable[[Predictions], bool]
    compute: Callable[[Predictions], float]


def missing_packages() -> list[str]:
    """Return the packages of the extra `eval` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def compute_classification_metrics(predictions: Predictions) -> dict[str, float]:
    """Return every metric that applies, by name; NaN if it is undefined, such as the correlation of constants."""
    return {
        name: float(metric.compute(predictions))
        for name, metric in CLASSIFICATION_METRICS.items()
        if metric.applies(predictions)
    }


def _macro_f1(predictions: Predictions) -> float:
    from sklearn.metrics import f1_score

    # The mean is over the labels that occur in targets or predictions: for any other label F1 is undefined.
    score: float = f1_score(predictions.targets, predictions.predicted, average="macro", zero_division=0.0)
    return score


def _micro_f1(predictions: Predictions) -> float:
    from sklearn.metrics import f1_score

    score: float = f1_score(predictions.targets, predictions.predicted, average="micro", zero_division=0.0)
    return score


def _matthews(predictions: Predictions) -> float:
    from sklearn.metrics import matthews_corrcoef

    coefficient: float = matthews_corrcoef(predictions.targets, predictions.predicted)
    return coefficient


def _pearson(predictions: Predictions) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(predictions.targets[:, 0], predictions.predicted[:, 0]).statistic)


def _spearman(predictions: Predictions) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predictions.targets[:, 0], predictions.predicted[:, 0]).statistic)


def _entity_f1(predictions: Predictions) -> float:
    from seqeval.metrics import f1_score

    row_starts = np.flatnonzero(np.diff(predictions.row, prepend=-1))
    names = np.array(predictions.names)
    targets, predicted = (
        [tags.tolist() for tags in np.split(names[classes.astype(int)], row_starts[1:])]
        for classes in (predictions.targets, predictions.predicted)
    )
    return float(f1_score(targets, predicted, zero_division=0))


def _is_multi_label(predictions: Predictions) -> bool:
    return predictions.kind == "multi"


def _is_single_value(predictions: Predictions) -> bool:
    return predictions.kind == "regression" and predictions.targets.shape[1] == 1 and len(predictions.targets) > 1


def _has_iob_tags(predictions: Predictions) -> bool:
    """Return whether the labels are IOB tags, such as B-PER, I-PER and O."""
    names = predictions.names
    return predictions.kind == "single" and any(name.startswith("B-") for name in names) and "O" in names


def _is_one_class_per_row(predictions: Predictions) -> bool:
    return predictions.kind == "single" and bool((np.diff(predictions.row) == 1).all())


CLASSIFICATION_METRICS: dict[str, ClassificationMetric] = {
    "macro_f1": ClassificationMetric(lambda predictions: predictions.kind != "regression", _macro_f1),
    "micro_f1": ClassificationMetric(_is_multi_label, _micro_f1),
    "mcc": ClassificationMetric(_is_one_class_per_row, _matthews),
    "entity_f1": ClassificationMetric(_has_iob_tags, _entity_f1),
    "pearson": ClassificationMetric(_is_single_value, _pearson),
    "spearman": ClassificationMetric(_is_single_value, _spearman),
}
