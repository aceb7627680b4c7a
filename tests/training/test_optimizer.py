"""The learning rate of every step and the optimizers, against their definitions and against the libraries."""

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import TrainingSpec
from lora_cli.training.lr_schedule import learning_rate, set_learning_rate, warmup_steps
from lora_cli.training.optimizer import choose_optimizer, make_optimizer, moment_bytes
from tests.model import zoo

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


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "quantized", "chosen"),
    [
        ("auto", CPU, False, "adamw"),
        ("auto", CPU, True, "adamw"),
        ("auto", GPU, False, "adamw"),
        ("auto", GPU, True, "paged-adamw"),
        ("adamw", GPU, True, "adamw"),
        ("adamw-8bit", CPU, False, "adamw-8bit"),
        ("paged-adamw", GPU, False, "paged-adamw"),
        ("paged-adamw-8bit", GPU, True, "paged-adamw-8bit"),
    ],
)
def test_auto_chooses_and_a_name_is_taken(name: str, device: torch.device, quantized: bool, chosen: str):
    assert choose_optimizer(name, device=device, quantized=quantized) == chosen


@pytest.mark.parametrize(("name", "instead"), [("paged-adamw", "adamw"), ("paged-adamw-8bit", "adamw-8bit")])
def test_a_machine_that_cannot_page_says_what_to_write(name: str, instead: str):
    with pytest.raises(LoraError) as caught:
        choose_optimizer(name, device=CPU, quantized=True)
    assert caught.value.message.startswith(f"training.optimizer: {name} pages between a CUDA GPU and the host")
    assert caught.value.hint == f"write {instead}, or auto"


def losses(name: str, *, method: str = "lora", steps: int = 30) -> tuple[list[float], torch.optim.Optimizer]:
    """Loss of each step on one text, wide enough that bitsandbytes holds the moments in 8 bits."""
    model = zoo.attached(zoo.make("llama", hidden_size=256, intermediate_size=512), method=method, rank=16, seed=3)
    optimizer = make_optimizer(model, TrainingSpec(learning_rate=5e-3), name=name)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, optimizer


def test_eight_bit_adamw_learns_on_the_cpu_as_adamw_does():
    whole, _ = losses("adamw")
    eight, optimizer = losses("adamw-8bit")
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert eight[0] == whole[0]
    assert whole[-1] < 0.3 * whole[0]
    assert eight[-1] < 0.3 * eight[0]
    assert eight[9] != whole[9], "the moments are rounded"
    assert eight[5] == pytest.approx(whole[5], rel=0.05)


def test_moments_take_the_bytes_that_the_plan_counts():
    for name in ("adamw", "adamw-8bit"):
        _, optimizer = losses(name, steps=1)
        large = [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= 4096]
        assert large
        for parameter in large:
            moments = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
            moments = [t for t in moments if t.shape == parameter.shape]
            assert [t.element_size() for t in moments] == [moment_bytes(name)] * 2


def test_lora_plus_gives_b_its_ratio_as_peft_does():
    spec, ratio = TrainingSpec(learning_rate=1e-3), 16.0
    ours = zoo.attached(zoo.make("llama"), method="lora+", lr_ratio=ratio)
    optimizer = make_optimizer(ours, spec, lr_ratio=ratio)
    set_learning_rate(optimizer, spec.learning_rate)
    theirs = get_peft_model(zoo.make("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    library = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio)

    def rates(model: torch.nn.Module, by: torch.optim.Optimizer) -> dict[str, float]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in by.param_groups for p in group["params"]}

    mine = rates(ours, optimizer)
    assert mine == rates(theirs, library)
    assert set(mine.values()) == {1e-3, 16e-3}
    assert {name for name, rate in mine.items() if rate == 16e-3} == {name for name in mine if ".lora_B." in name}
    set_learning_rate(optimizer, 5e-4)
    assert set(rates(ours, optimizer).values()) == {5e-4, 8e-3}
