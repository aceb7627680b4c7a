"""How sure a mean over rows is, and a difference between two models on the same rows: by the bootstrap.

Rows are drawn with replacement, each with all of its tokens: tokens of one row say much the same, and counting them as
independent would make every interval too narrow (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_CHUNK_NUMBERS = 1 << 22  # numbers: draws are made a few at a time where the rows are many


class Interval(NamedTuple):
    """A mean, and between what it lies in 95 of 100 draws."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def mean_interval(sums: NDArray[np.float64], units: NDArray[np.int64], *, seed: int = 0) -> Interval:
    """The mean over units, from the sum and the number of units of each row."""
    draws = _resampled_means(np.stack([sums]), units, seed=seed)[0]
    return _percentile_interval(float(sums.sum() / units.sum()), draws)


def difference_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], units: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """How far the mean of `second` is above that of `first`, on the same draws of rows: what they share goes out."""
    draws = _resampled_means(np.stack([first, second]), units, seed=seed)
    return _percentile_interval(float((second - first).sum() / units.sum()), draws[1] - draws[0])


def _resampled_means(sums: NDArray[np.float64], units: NDArray[np.int64], *, seed: int) -> NDArray[np.float64]:
    """Means [models, draws] of `sums` [models, rows]."""
    rng = np.random.default_rng(seed)
    rows = len(units)
    found = []
    for start in range(0, RESAMPLES, per := max(1, MAX_CHUNK_NUMBERS // rows)):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(per, RESAMPLES - start))  # [draws, rows]
        found.append((sums @ counts.T) / np.maximum(1, units @ counts.T))
    return np.concatenate(found, axis=1)


def _percentile_interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
