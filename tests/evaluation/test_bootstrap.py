"""Intervals hold what they promise: on rows that are drawn anew, they miss the truth about one time in twenty."""

import numpy as np
import pytest

from lora_cli.evaluation import bootstrap


def test_an_interval_holds_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        units = rng.integers(1, 30, 80)
        # Tokens of a row share its level: rows are what is drawn.
        level = rng.normal(2.0, 0.5, 80)
        sums = level * units + rng.normal(0, 1, 80) * np.sqrt(units)
        found = bootstrap.mean_interval(sums, units, seed=trial)
        assert found.low <= found.value <= found.high
        hits += found.low <= 2.0 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_what_two_models_share_is_not_in_their_difference():
    rng = np.random.default_rng(2)
    units = rng.integers(1, 30, 100)
    shared = rng.normal(3.0, 1.0, 100) * units
    better = shared - 0.1 * units
    apart = bootstrap.difference_interval(better, shared, units)
    assert apart.value == pytest.approx(0.1)
    assert apart.half < 1e-9 < bootstrap.mean_interval(shared, units).half


def test_one_seed_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    units = np.arange(1, 20)
    sums = np.sqrt(units)
    first = bootstrap.mean_interval(sums, units)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 1)
    assert bootstrap.mean_interval(sums, units)._asdict().keys() == first._asdict().keys()
    assert bootstrap.mean_interval(sums, units).value == first.value
