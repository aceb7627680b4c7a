"""Bootstrap intervals have their nominal coverage: on new samples of rows, they miss the true mean in about 5%."""

import numpy as np
import pytest

from lora_cli.evaluation import bootstrap


@pytest.mark.slow
def test_an_interval_contains_the_true_mean_in_about_95_of_100_samples():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        units = rng.integers(1, 30, 80)
        # The tokens of a row have a common mean, so that only the rows are independent.
        row_means = rng.normal(2.0, 0.5, 80)
        sums = row_means * units + rng.normal(0, 1, 80) * np.sqrt(units)
        interval = bootstrap.mean_interval(sums, units, seed=trial)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 2.0 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_variation_common_to_two_models_cancels_in_their_difference():
    rng = np.random.default_rng(2)
    units = rng.integers(1, 30, 100)
    worse = rng.normal(3.0, 1.0, 100) * units
    better = worse - 0.1 * units
    difference = bootstrap.difference_interval(better, worse, units)
    assert difference.value == pytest.approx(0.1)
    assert difference.half_width < 1e-9 < bootstrap.mean_interval(worse, units).half_width


def test_the_chunk_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    units = np.arange(1, 20)
    sums = np.sqrt(units)
    interval = bootstrap.mean_interval(sums, units)
    monkeypatch.setattr(bootstrap, "MAX_COUNTS_PER_CHUNK", 1)
    assert bootstrap.mean_interval(sums, units) == pytest.approx(interval, rel=1e-12)
