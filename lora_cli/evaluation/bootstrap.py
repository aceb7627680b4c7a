"""Bootstrap confidence intervals: of a mean over rows, and of the difference between two models on the same rows.

Rows are resampled with replacement, each with all of its tokens. Tokens of one row are correlated: resampling them
independently would make every interval too narrow (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_COUNTS_PER_CHUNK = 1 << 22  # numbers in one [draws, rows] array; bounds the memory when there are many rows


class Interval(NamedTuple):
    """A mean with its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_interval(sums: NDArray[np.float64], units: NDArray[np.int64], *, seed: int = 0) -> Interval:
    """Return the mean over all units with its confidence interval.

    Args:
        sums: [rows] fp64, the sum over the units of each row.
        units: [rows] int64, the number of units (tokens, words or 1) of each row.
        seed: of the resampling.
    """
    means = _resampled_means(np.stack([sums]), units, seed=seed)[0]
    return _percentile_interval(float(sums.sum() / units.sum()), means)


def difference_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], units: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """Return the mean of `second` minus the mean of `first`, with its confidence interval.

    Both are resampled with the same rows (paired bootstrap), so that variation common to both cancels.

    Args:
        first: [rows] fp64, sums over the units of each row.
        second: [rows] fp64, the same of the other model.
        units: [rows] int64, the number of units of each row.
        seed: of the resampling.
    """
    means = _resampled_means(np.stack([first, second]), units, seed=seed)
    return _percentile_interval(float((second - first).sum() / units.sum()), means[1] - means[0])


def _resampled_means(sums: NDArray[np.float64], units: NDArray[np.int64], *, seed: int) -> NDArray[np.float64]:
    """Return the means [models, resamples] fp64 of `sums` [models, rows]."""
    rng = np.random.default_rng(seed)
    rows = len(units)
    chunks = []
    for start in range(0, RESAMPLES, chunk_size := max(1, MAX_COUNTS_PER_CHUNK // rows)):
        # How often each row is drawn in each resample: [draws, rows].
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(chunk_size, RESAMPLES - start))
        chunks.append((sums @ counts.T) / np.maximum(1, units @ counts.T))
    return np.concatenate(chunks, axis=1)


def _percentile_interval(value: float, means: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
