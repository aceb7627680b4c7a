"""Learning rate schedules and optimizers, against their definitions and against the libraries."""

from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    Adafactor,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_cli.errors import LoraError
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.training_rules import WITHOUT_MATRICES, check_optimizer
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training import optimizer as optimizer_module
from lora_cli.training.lr_schedule import (
    check_schedule_fits,
    describe_schedule,
    learning_rate,
    set_learning_rate,
    warmup_steps,
)
from lora_cli.training.muon import MuonWithAdamW
from lora_cli.training.optimizer import (
    OPTIMIZERS,
    averaged_weights,
    choose_optimizer,
    make_optimizer,
    optimizer_state,
    restore_optimizer_state,
    state_bytes,
    trained_shapes,
)
from lora_cli.training.schedule_free import ScheduleFreeAdamW
from tests.model import zoo

PEAK = 0.25


def rates(total: int, schedule: str, warmup: float, **options: float) -> list[float]:
    spec = TrainingSpec.model_validate({"learning_rate": PEAK, "schedule": schedule, "warmup": warmup, **options})
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


def library_rates(scheduler_of, total: int) -> list[float]:
    """The rates of a scheduler of transformers, before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = scheduler_of(optimizer)
    by_step = []
    for _ in range(total):
        by_step.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return by_step


LOWEST = PEAK / 10


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("cycles", [2, 3])
def test_restarts_equal_transformers_and_start_each_cycle_at_the_peak(warmup: int, cycles: int):
    total = warmup + 10 * cycles
    ours = rates(total, "cosine-with-restarts", warmup, cycles=cycles)
    theirs = library_rates(
        lambda optimizer: get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, total, cycles), total
    )
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[warmup::10] == [PEAK] * cycles
    lowest = rates(total, "cosine-with-restarts", warmup, cycles=cycles, min_learning_rate=LOWEST)
    assert lowest[warmup::10] == [PEAK] * cycles
    assert min(lowest[warmup:]) == pytest.approx(
        LOWEST + (PEAK - LOWEST) * 0.5 * (1 + torch.tensor(0.9 * torch.pi).cos())
    )


@pytest.mark.parametrize("lowest", [0, LOWEST])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 10), (5, 10), (5, 15), (0, 20)])
def test_warmup_stable_decay_equals_transformers_with_linear_decay(warmup: int, decay: int, lowest: float):
    ours = rates(20, "wsd", warmup, decay=decay, min_learning_rate=lowest)
    theirs = library_rates(
        lambda optimizer: get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=20, decay_type="linear", min_lr_ratio=lowest / PEAK
        ),
        20,
    )
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[20 - decay] == PEAK  # the decay starts from the peak: no jump
    assert ours[-1] == pytest.approx(lowest + (PEAK - lowest) / decay)


def test_the_decay_is_a_fraction_below_one_and_steps_from_one():
    by_step = rates(100, "wsd", 0.03)
    assert by_step[3:91] == [PEAK] * 88
    assert by_step[91] == pytest.approx(PEAK * 0.9)
    assert rates(100, "wsd", 0.03, decay=10) == by_step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "cosine-with-restarts"])
def test_the_decay_ends_at_the_minimum_learning_rate(schedule: str):
    by_step = rates(1000, schedule, 10, min_learning_rate=LOWEST)
    assert LOWEST <= by_step[-1] < 1.1 * LOWEST
    assert max(by_step) == PEAK


def test_the_minimum_of_cosine_equals_transformers():
    theirs = library_rates(
        lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 20, min_lr=LOWEST), 20
    )
    assert rates(20, "cosine", 5, min_learning_rate=LOWEST)[5:] == pytest.approx(theirs[5:], rel=1e-12)


@given(
    total=st.integers(1, 300),
    schedule=st.sampled_from(["wsd", "cosine-with-restarts"]),
    warmup=st.floats(0, 1, exclude_max=True),
    share=st.floats(0, 1, exclude_min=True),
    cycles=st.integers(2, 9),
)
def test_new_schedules_stay_between_their_bounds(total: int, schedule: str, warmup: float, share: float, cycles: int):
    options: dict[str, float] = {"cycles": cycles}
    if schedule == "wsd":
        options = {"decay": max(1e-9, min(share, 1 - warmup) * 0.999)}
    by_step = rates(total, schedule, warmup, min_learning_rate=LOWEST, **options)
    after = by_step[warmup_steps(warmup, total) :]
    assert all(LOWEST <= rate <= PEAK for rate in after)
    assert after[:1] in ([], [PEAK])
    if schedule == "wsd":
        assert after == sorted(after, reverse=True)
        check_schedule_fits(TrainingSpec.model_validate({"schedule": schedule, "warmup": warmup, **options}), total)


def test_a_decay_longer_than_the_run_is_refused_and_a_longer_warmup_is_told():
    spec = TrainingSpec.model_validate({"schedule": "wsd", "decay": 20, "warmup": 5})
    check_schedule_fits(spec, 25)
    with pytest.raises(LoraError) as caught:
        check_schedule_fits(spec, 24)
    assert caught.value.message == (
        "training.decay: 20 steps of decay and 5 of warmup are more than the 24 steps of this run"
    )
    assert describe_schedule(spec, 40) == ["learning rate: 5 steps of warmup, 15 stable, 20 of decay"]
    (note,) = describe_schedule(TrainingSpec(warmup=100.0, learning_rate=1e-3), 10)
    assert note == (
        "note: the warmup of 100 steps is longer than the run: the learning rate ends at 0.0001, "
        "and never reaches 0.001"
    )


def step_of(optimizer: torch.optim.Optimizer, weight: torch.Tensor, grad: torch.Tensor) -> None:
    weight.grad = grad.clone()
    optimizer.step()


def matrix(seed: int = 0) -> torch.nn.Module:
    """A model whose one parameter is named like LoRA's A, 6 x 8."""
    model = torch.nn.Module()
    model.q_proj = torch.nn.Module()
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    model.q_proj.lora_A = torch.nn.ParameterDict({"default": values})
    return model


def test_lion_follows_its_formula():
    model = matrix()
    (weight,) = model.parameters()
    optimizer = make_optimizer(model, TrainingSpec(learning_rate=0.01, weight_decay=0.1), name="lion")
    expected, m = weight.detach().clone(), torch.zeros(6, 8)
    for seed in range(4):
        grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        step_of(optimizer, weight, grad)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (0.9 * m + 0.1 * grad).sign()
        m = 0.99 * m + 0.01 * grad
        assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_muon_takes_steps_with_equal_singular_values_of_the_size_of_adamw():
    model = matrix()
    (weight,) = model.parameters()
    optimizer = make_optimizer(model, TrainingSpec(learning_rate=0.01), name="muon")
    before = weight.detach().clone()
    step_of(optimizer, weight, torch.randn(6, 8, generator=torch.Generator().manual_seed(5)))
    change = (weight.detach() - before) / 0.01
    values = torch.linalg.svdvals(change) / (0.2 * 8**0.5)
    assert float(values.min()) > 0.4  # Newton-Schulz brings singular values near 1, not to it
    assert float(values.max()) < 1.6
    assert float(change.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_muon_trains_lora_matrices_and_adamw_the_rest():
    model = zoo.attached(zoo.make("llama"), method="dora", modules_to_save=["lm_head"])
    optimizer = make_optimizer(model, TrainingSpec(), name="muon")
    assert isinstance(optimizer, MuonWithAdamW)
    kinds = {name: type(optimizer.part_of(p)).__name__ for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, kind in kinds.items() if kind == "Muon"} == {
        name for name in kinds if ".lora_A." in name or ".lora_B." in name
    }
    assert set(kinds.values()) == {"Muon", "AdamW"}
    for method in WITHOUT_MATRICES:
        with pytest.raises(LoraError, match="muon trains matrices, and this adapter has none"):
            make_optimizer(zoo.attached(zoo.make("llama"), method=method), TrainingSpec(), name="muon")


def test_muon_takes_groups_of_as_many_matrices_as_other_parameters():
    # A of one layer at the learning rate of the others, next to one fully trained module.
    model = zoo.attached(
        zoo.make("llama"), method="lora+", target_modules=["q_proj"], layers=[0], modules_to_save=["lm_head"]
    )
    optimizer = make_optimizer(model, TrainingSpec(), name="muon", lr_ratio=4.0)
    assert isinstance(optimizer, MuonWithAdamW)
    groups = [(group["ratio"], type(part).__name__) for part in optimizer.parts for group in part.param_groups]
    assert sorted(groups) == [(1.0, "AdamW"), (1.0, "Muon"), (4.0, "Muon")]


def test_recipes_refuse_muon_for_exactly_the_methods_without_matrices():
    data = {"train": "a.jsonl"}
    refused = {
        method
        for method in METHOD_FACTS
        for conflict in check_optimizer(
            Recipe.model_validate(
                {"model": {"path": "m"}, "data": data, "adapter": {"method": method}, "training": {"optimizer": "muon"}}
            )
        )
        if "muon trains the matrices" in conflict.message
    }
    assert refused == set(WITHOUT_MATRICES)
    for method in set(zoo.METHODS) - refused:
        make_optimizer(zoo.attached(zoo.make("llama"), method=method), TrainingSpec(), name="muon")


def test_schedule_free_adamw_follows_the_algorithm():
    """Defazio et al., algorithm 1 with AdamW's scaling, written with x, y and z; a warmup weights the average."""
    model = torch.nn.ParameterList([torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    weight, b1, b2, decay = model[0], 0.9, 0.99, 0.1
    spec = TrainingSpec(adam_beta1=b1, adam_beta2=b2, weight_decay=decay)
    optimizer = make_optimizer(model, spec, name="schedule-free-adamw")
    x = z = weight.detach().clone()
    v, total = torch.zeros(5).double(), 0.0
    for t, rate in enumerate((0.005, 0.01, 0.01, 0.01), 1):
        set_learning_rate(optimizer, rate)
        y = (1 - b1) * z + b1 * x
        assert torch.allclose(weight.detach(), y, rtol=1e-12)
        grad = torch.randn(5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        step_of(optimizer, weight, grad)
        v = b2 * v + (1 - b2) * grad**2
        z = z - rate * (grad / ((v / (1 - b2**t)).sqrt() + 1e-8) + decay * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        training = weight.detach().clone()
        with averaged_weights(optimizer):
            assert torch.allclose(weight.detach(), x, rtol=1e-12)
        assert torch.equal(weight.detach(), training)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, "adamw"),
        ("auto", GPU, "adamw"),
        ("adamw", GPU, "adamw"),
        ("adamw-8bit", CPU, "adamw-8bit"),
        ("paged-adamw", GPU, "paged-adamw"),
        ("paged-adamw-8bit", GPU, "paged-adamw-8bit"),
    ],
)
def test_auto_is_adamw_on_every_device(name: str, device: torch.device, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizer_module, "has_unified_memory", lambda index: True)
    assert choose_optimizer(name, device=device) == expected


@pytest.mark.parametrize(("name", "instead"), [("paged-adamw", "adamw"), ("paged-adamw-8bit", "adamw-8bit")])
def test_a_paged_optimizer_on_a_cpu_is_an_error_with_a_hint(name: str, instead: str):
    with pytest.raises(LoraError) as caught:
        choose_optimizer(name, device=CPU)
    assert caught.value.message.startswith(f"training.optimizer: {name} pages between a CUDA GPU and the host")
    assert caught.value.hint == f"write {instead}, or auto"


def test_a_gpu_without_unified_memory_is_told_before_the_rows_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizer_module, "has_unified_memory", lambda index: False)
    with pytest.raises(LoraError, match="paged-lion needs unified memory, which this GPU does not have"):
        choose_optimizer("paged-lion", device=GPU)


class Driver:
    """CUDA's driver, with a GPU that has unified memory or not."""

    def __init__(self, value: int) -> None:
        self.value = value

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, index: int) -> int:
        assert attribute == optimizer_module.MANAGED_MEMORY
        pointer._obj.value = self.value
        return 0


@pytest.mark.parametrize("value", [0, 1])
def test_the_driver_says_whether_there_is_unified_memory(value: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizer_module.ctypes, "CDLL", lambda name: Driver(value))
    assert optimizer_module.has_unified_memory(0) == bool(value)


def test_without_a_driver_unified_memory_is_assumed():
    assert optimizer_module.has_unified_memory(0)


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


ON_THE_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]
RATES = {"lion": 2e-3, "lion-8bit": 2e-3, "schedule-free-adamw": 2e-2}  # others: 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_every_optimizer_learns_and_its_state_is_restored_bit_for_bit(name: str):
    """The state of some steps, through tensors alone, continues as if there had been no interruption."""
    ids = torch.randint(3, zoo.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    spec = TrainingSpec.model_validate(
        {"learning_rate": RATES.get(name, 5e-3), "optimizer": name, "weight_decay": 0.01}
    )

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = zoo.attached(zoo.make("llama", hidden_size=128, intermediate_size=256), rank=32, seed=3)
        return model, make_optimizer(model, spec, name=name)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        with torch.no_grad(), averaged_weights(optimizer):
            return model(input_ids=ids, labels=ids).loss.item()

    model, optimizer = make()
    start = loss(model, optimizer)
    train(model, optimizer, 8)
    resumed, resumed_optimizer = make()
    own, other = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, resumed))
    with torch.no_grad(), averaged_weights(optimizer):
        states = {n: {k: v.clone() for k, v in optimizer_state(optimizer, p).items()} for n, p in own.items()}
        for n, p in other.items():  # as the adapter in a checkpoint: the average of a schedule-free optimizer
            p.copy_(own[n])
            restore_optimizer_state(resumed_optimizer, p, states[n])
    for each, its_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
        train(each, its_optimizer, 6)
    assert all(torch.equal(p, other[n]) for n, p in own.items())
    assert loss(model, optimizer) == loss(resumed, resumed_optimizer)
    assert loss(model, optimizer) < 0.9 * start


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_the_state_has_the_size_of_the_memory_plan(name: str):
    model = zoo.attached(zoo.make("llama", hidden_size=128, intermediate_size=256), rank=32, method="dora")
    optimizer = make_optimizer(model, TrainingSpec.model_validate({"optimizer": name}), name=name)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    tensors = [
        value
        for p in model.parameters()
        if p.requires_grad
        for key, value in optimizer_state(optimizer, p).items()
        if value.ndim and key != "training_weights"  # the parameters themselves
    ]
    assert sum(t.numel() * t.element_size() for t in tensors) == state_bytes(name, trained_shapes(model))


def test_classes_of_the_optimizers():
    model = zoo.attached(zoo.make("llama"))
    kinds = {name: type(make_optimizer(model, TrainingSpec(), name=name)) for name in OPTIMIZERS}
    assert kinds["lion-8bit"] is bitsandbytes.optim.Lion8bit
    assert kinds["paged-lion"] is bitsandbytes.optim.PagedLion32bit
    assert kinds["paged-lion-8bit"] is bitsandbytes.optim.PagedLion8bit
    assert kinds["adafactor"] is Adafactor
    assert kinds["schedule-free-adamw"] is ScheduleFreeAdamW


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
