"""Learning rate schedules and optimizers, against their definitions and against the libraries."""

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
def test_every_rate_is_above_zero_and_at_most_the_peak(total: int, schedule: str, warmup: float):
    by_step = rates(total, schedule, warmup)
    warmup_end = warmup_steps(warmup, total)
    assert all(0 < rate <= PEAK for rate in by_step)
    assert by_step[:warmup_end] == sorted(by_step[:warmup_end])
    assert by_step[warmup_end:] == sorted(by_step[warmup_end:], reverse=True)
    if warmup_end < total:
        assert max(by_step) == PEAK


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0, 100, 0), (0.03, 100, 3), (0.05, 70, 4), (0.03, 7, 1), (10, 100, 10), (1, 100, 1)]
)
def test_warmup_is_a_fraction_below_one_and_steps_from_one(warmup: float, total: int, steps: int):
    assert warmup_steps(warmup, total) == steps
    warmup_rates = rates(total, "constant", warmup)[:steps]
    assert warmup_rates == pytest.approx([PEAK * (n + 1) / steps for n in range(steps)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_the_rate_decays_to_half_in_the_middle_and_nearly_zero_at_the_end(schedule: str, warmup: float):
    by_step = rates(1000, schedule, warmup)
    assert by_step[-1] < PEAK * 2e-3
    warmup_end = warmup_steps(warmup, 1000)
    middle = by_step[warmup_end + (1000 - warmup_end) // 2]
    assert middle == pytest.approx(PEAK / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "library"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
        ("constant", lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup)),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 20), (20, 20)])
def test_schedules_equal_transformers_except_that_warmup_starts_above_zero(schedule, library, warmup: int, total: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = library(optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = rates(total, schedule, warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    # The first warmup step of transformers has rate 0 and changes nothing; ours is one step ahead during warmup.
    assert ours[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup], rel=1e-12)
    assert not warmup or theirs[0] == 0 < ours[0]


def test_the_optimizer_follows_the_formula_of_adamw():
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
    ("name", "device", "quantized", "expected"),
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
def test_auto_depends_on_device_and_quantization(name: str, device: torch.device, quantized: bool, expected: str):
    assert choose_optimizer(name, device=device, quantized=quantized) == expected


@pytest.mark.parametrize(("name", "instead"), [("paged-adamw", "adamw"), ("paged-adamw-8bit", "adamw-8bit")])
def test_a_paged_optimizer_on_a_cpu_is_an_error_with_a_hint(name: str, instead: str):
    with pytest.raises(LoraError) as caught:
        choose_optimizer(name, device=CPU, quantized=True)
    assert caught.value.message.startswith(f"training.optimizer: {name} pages between a CUDA GPU and the host")
    assert caught.value.hint == f"write {instead}, or auto"


def losses(name: str, *, method: str = "lora", steps: int = 30) -> tuple[list[float], torch.optim.Optimizer]:
    """Train on one text; layers are wide enough that bitsandbytes stores the moments in 8 bits. Return all losses."""
    model = zoo.attached(zoo.make("llama", hidden_size=256, intermediate_size=512), method=method, rank=16, seed=3)
    optimizer = make_optimizer(model, TrainingSpec(learning_rate=5e-3), name=name)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    by_step = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        by_step.append(loss.item())
    return by_step, optimizer


def test_eight_bit_adamw_learns_on_the_cpu_as_adamw_does():
    fp32, _ = losses("adamw")
    eight_bit, optimizer = losses("adamw-8bit")
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert eight_bit[0] == fp32[0]
    assert fp32[-1] < 0.3 * fp32[0]
    assert eight_bit[-1] < 0.3 * eight_bit[0]
    assert eight_bit[9] != fp32[9], "the moments are rounded"
    assert eight_bit[5] == pytest.approx(fp32[5], rel=0.05)


def test_moments_have_the_size_that_moment_bytes_returns():
    for name in ("adamw", "adamw-8bit"):
        _, optimizer = losses(name, steps=1)
        large = [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= 4096]
        assert large
        for parameter in large:
            moments = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
            moments = [t for t in moments if t.shape == parameter.shape]
            assert [t.element_size() for t in moments] == [moment_bytes(name)] * 2


def test_lora_plus_scales_the_rate_of_b_as_peft_does():
    spec, ratio = TrainingSpec(learning_rate=1e-3), 16.0
    ours = zoo.attached(zoo.make("llama"), method="lora+", lr_ratio=ratio)
    optimizer = make_optimizer(ours, spec, lr_ratio=ratio)
    set_learning_rate(optimizer, spec.learning_rate)
    theirs = get_peft_model(zoo.make("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    library = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio)

    def rates_by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    our_rates = rates_by_name(ours, optimizer)
    assert our_rates == rates_by_name(theirs, library)
    assert set(our_rates.values()) == {1e-3, 16e-3}
    b_names = {name for name in our_rates if ".lora_B." in name}
    assert {name for name, rate in our_rates.items() if rate == 16e-3} == b_names
    set_learning_rate(optimizer, 5e-4)
    assert set(rates_by_name(ours, optimizer).values()) == {5e-4, 8e-3}
