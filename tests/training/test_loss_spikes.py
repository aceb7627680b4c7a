"""Loss spikes: what is one, and a state that makes the same decisions after it was saved and loaded."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.errors import LoraError
from lora_cli.training.loss_spikes import MAX_SKIPPED_IN_A_ROW, MIN_STEPS, WINDOW, LossSpikes, Spike

LOSSES = st.lists(st.floats(0, 1e4, allow_subnormal=False), max_size=200)


def detector(losses: list[float]) -> LossSpikes:
    spikes = LossSpikes()
    for loss in losses:
        spikes.compare(loss)
    return spikes


def test_a_loss_above_six_standard_deviations_is_a_spike():
    losses = np.random.default_rng(0).normal(2.0, 0.3, WINDOW).tolist()
    limit = float(np.mean(losses) + 6 * np.std(losses))
    assert detector(losses).compare(limit - 1e-6) is None
    spike = detector(losses).compare(limit + 1e-6)
    assert spike
    assert (spike.mean, spike.sigma, spike.steps) == (
        pytest.approx(np.mean(losses)),
        pytest.approx(np.std(losses)),
        WINDOW,
    )
    assert spike.describe(spike.mean + 7.3 * spike.sigma).startswith(
        f"the loss {spike.mean + 7.3 * spike.sigma:.4f} is a spike, 7.3 sigma above the mean of the last 128 steps"
    )


def test_only_the_last_steps_are_compared():
    assert detector([1000.0] * 50 + [2.0] * WINDOW).compare(3.0)
    assert detector([1000.0] * 50 + [2.0] * (WINDOW - 1)).compare(3.0) is None


def test_the_first_steps_are_not_judged():
    assert detector([2.0] * (MIN_STEPS - 1)).compare(1e6) is None
    assert detector([2.0] * MIN_STEPS).compare(1e6)


@pytest.mark.parametrize(("level", "tolerated"), [(2.0, 2.1), (1e-5, 5e-3), (0.0, 5e-3)])
def test_rounding_in_a_flat_loss_is_no_spike(level: float, tolerated: float):
    assert detector([level] * WINDOW).compare(tolerated) is None
    assert detector([level] * WINDOW).compare(2 * tolerated)


def test_one_spike_does_not_hide_the_next():
    spikes = detector(np.random.default_rng(0).normal(2.0, 0.1, WINDOW).tolist())
    assert spikes.compare(1e6)
    assert spikes.compare(4.0)


@pytest.mark.parametrize("level", [3.0, 30.0, 3000.0])
def test_a_lasting_change_is_soon_no_spike_any_more(level: float):
    spikes = detector(np.random.default_rng(0).normal(2.0, 0.1, WINDOW).tolist())
    found = [spikes.compare(level) is not None for _ in range(WINDOW)]
    assert found[0]
    assert not found[-1]
    assert sum(a != b for a, b in pairwise(found)) == 1


@given(before=LOSSES, after=LOSSES)
def test_a_restored_state_makes_the_same_decisions(before: list[float], after: list[float]):
    spikes, restored = detector(before), LossSpikes()
    restored.restore(json.loads(json.dumps(spikes.to_json())))
    assert [spikes.compare(loss) for loss in after] == [restored.compare(loss) for loss in after]
    assert spikes.to_json() == restored.to_json()


@given(losses=LOSSES)
def test_every_value_is_finite(losses: list[float]):
    spikes = LossSpikes()
    for found in map(spikes.compare, losses):
        assert found is None or (math.isfinite(found.mean) and found.sigma > 0)


def make_spike(*, skipped: bool) -> Spike:
    return Spike("the loss 9.0000 is a spike", [f"rows.jsonl:{n}" for n in range(7)], skipped=skipped, mean=1, sigma=1)


def test_too_many_skipped_steps_in_a_row_are_an_error():
    spikes = LossSpikes()
    for number in range(MAX_SKIPPED_IN_A_ROW):
        spikes.add(number + 1, make_spike(skipped=True))
    spikes.add(9, None)
    for number in range(MAX_SKIPPED_IN_A_ROW):
        spikes.add(number + 10, make_spike(skipped=True))
    restored = LossSpikes()
    restored.restore(spikes.to_json())
    for each in (spikes, restored):
        with pytest.raises(LoraError) as caught:
            each.add(18, make_spike(skipped=True))
        assert caught.value.exit_code == 1
        assert caught.value.message.startswith("step 18: the loss 9.0000 is a spike, and so were the 8 steps before it")
        assert caught.value.message.endswith(
            "its rows: " + ", ".join(f"rows.jsonl:{n}" for n in range(5)) + " and 2 more"
        )


def test_spikes_that_are_only_told_may_go_on():
    spikes = LossSpikes()
    for number in range(50):
        spikes.add(number + 1, make_spike(skipped=False))
    assert (spikes.count, spikes.skipped) == (50, 0)


@pytest.mark.parametrize(
    ("skipped", "line"),
    [
        ([], None),
        ([False], "1 loss spike, trained on: `spike` in metrics.jsonl"),
        ([True, True], "2 loss spikes, skipped: `spike` in metrics.jsonl"),
        ([True, False, True], "3 loss spikes, 2 of them skipped: `spike` in metrics.jsonl"),
    ],
)
def test_the_spikes_of_a_run_are_counted(skipped: list[bool], line: str | None):
    spikes = LossSpikes()
    for number, each in enumerate(skipped):
        spikes.add(number + 1, make_spike(skipped=each))
    assert spikes.summary() == line
