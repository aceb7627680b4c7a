"""The learning rate of every step, against its definition and against transformers' schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_cli.recipe.schema import TrainingSpec
from lora_cli.training.optim import learning_rate, make_optimizer, warmup_steps

PEAK = 0.25


def rates(total: int, schedule: str, warmup: float) -> list[float]:
    spec = TrainingSpec.model_validate({"learning_rate": PEAK, "schedule": schedule, "warmup": warmup})
    return [learning_rate(step, spec=spec, total=total) for step in range(total)]


SCHEDULES = st.sampled_from(["constant", "linear", "cosine"])
WARMUPS = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 400).map(float))


@given(total=st.integers(1, 300), schedule=SCHEDULES, warmup=WARMUPS)
def test_every_step_learns_and_none_above_the_peak(total: int, schedule: str, warmup: float):
    found = rates(total, schedule, warmup)
    rise = warmup_steps(warmup, total)
    assert all(0 < rate <= PEAK for rate in found)
    assert found[:rise] == sorted(found[:rise])
    assert found[rise:] == sorted(found[rise:], reverse=True)
    if rise < total:
        assert max(found) == PEAK


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0, 100, 0), (0.03, 100, 3), (0.05, 70, 4), (0.03, 7, 1), (10, 100, 10), (1, 100, 1)]
)
def test_warmup_is_a_fraction_below_one_and_steps_from_one(warmup: float, total: int, steps: int):
    assert warmup_steps(warmup, total) == steps
    rise = rates(total, "constant", warmup)[:steps]
    assert rise == pytest.approx([PEAK * (n + 1) / steps for n in range(steps)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_the_last_step_is_nearly_at_zero(schedule: str, warmup: float):
    found = rates(1000, schedule, warmup)
    assert found[-1] < PEAK * 2e-3
    rise = warmup_steps(warmup, 1000)
    middle = found[rise + (1000 - rise) // 2]
    assert middle == pytest.approx(PEAK / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "library"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
        ("constant", lambda optimizer, rise, total: get_constant_schedule_with_warmup(optimizer, rise)),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 20), (20, 20)])
def test_it_is_transformers_schedule_but_for_a_warmup_that_wastes_no_step(schedule, library, warmup: int, total: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = library(optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    mine = rates(total, schedule, warmup)
    assert mine[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    # transformers' first step of a warmup has rate 0 and moves nothing; ours is one step ahead while it rises.
    assert mine[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup], rel=1e-12)
    assert not warmup or theirs[0] == 0 < mine[0]


def test_the_optimizer_is_adamw_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(5, generator=generator, dtype=torch.float64)])
    weight, b1, b2 = model[0], 0.8, 0.95
    spec = TrainingSpec(learning_rate=0.01, weight_decay=0.1, adam_beta1=b1, adam_beta2=b2)
    optimizer = make_optimizer(model, spec)
    expected, m, v = weight.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for t in range(1, 6):
        grad = torch.randn(5, generator=generator, dtype=torch.float64)
        weight.grad = grad.clone()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        expected = expected * (1 - 0.01 * 0.1)
        expected = expected - 0.01 * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        assert torch.allclose(weight.detach(), expected, rtol=1e-12, atol=0)
