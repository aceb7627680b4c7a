"""scripts/simulate_scale.py: the bytes of its formulas, the times that follow, and what bounds an entry."""

import sys

import pytest

from lora_cli.model.gpu_plan import Form, StrategyPlan, plan_strategies
from lora_cli.model.memory import FP32, TrainingMemory
from scripts import simulate_scale
from scripts.simulate_scale import Entry, Rates

TOKENS, PARAMETERS = 1000, 10**9
FAST = Rates(compute=1e13, nvlink=1e15, network=1e14)
KEPT, RECOMPUTED = Form("kept", None, False, TOKENS), Form("recomputed", 1, False, TOKENS)


@pytest.fixture(scope="module")
def memory() -> TrainingMemory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(simulate_scale.SHAPES, "tiny", (64, 128, 4, 8))
        return simulate_scale.memory_of("tiny", rank=4, bits=16)


def plan_of(memory: TrainingMemory, name: str, gpus: int, form: Form = KEPT) -> StrategyPlan:
    plans = plan_strategies(memory, [form], gpus=gpus, budget=1 << 50)
    return next(plan for plan in plans if plan.name == name)


def entry(memory: TrainingMemory, name: str, gpus: int, rates: Rates = FAST, form: Form = KEPT) -> Entry:
    plan = plan_of(memory, name, gpus, form)
    return simulate_scale.simulate(plan, memory, gpus=gpus, tokens=TOKENS, parameters=PARAMETERS, rates=rates)


def test_one_gpu_sends_nothing_and_takes_the_time_that_it_was_measured_with(memory: TrainingMemory):
    alone = entry(memory, "ddp", 1)
    assert (alone.sent, alone.exchange, alone.bound) == (0, 0, "compute")
    assert alone.step == pytest.approx(TOKENS * PARAMETERS / FAST.compute)


@pytest.mark.parametrize("gpus", [2, 8, 1024])
def test_the_bytes_are_those_of_ring_collectives(memory: TrainingMemory, gpus: int):
    gradients = FP32 * memory.trained.total
    base = sum(layer.total for layer in memory.weights.layers)
    share = (gpus - 1) / gpus
    assert entry(memory, "ddp", gpus).sent == pytest.approx(2 * share * gradients)
    gathered = 2 * (base + FP32 * memory.adapter.layers)  # in the forward and in the backward pass
    assert entry(memory, "fsdp", gpus).sent == pytest.approx(share * (gathered + gradients))


def test_recomputed_layers_take_half_as_long_again(memory: TrainingMemory):
    again = entry(memory, "ddp", 1, form=RECOMPUTED)
    assert again.compute == pytest.approx(1.5 * entry(memory, "ddp", 1).compute)


def test_ddp_adds_the_exchange_and_fsdp_hides_the_shorter_time(memory: TrainingMemory):
    slow = FAST._replace(nvlink=1e7)
    added, hidden = entry(memory, "ddp", 8, slow), entry(memory, "fsdp", 8, slow)
    assert added.step == added.compute + added.exchange
    assert hidden.step == max(hidden.compute, hidden.exchange)


@pytest.mark.parametrize(
    ("gpus", "rates", "bound"),
    [
        (8, FAST, "compute"),
        (8, FAST._replace(nvlink=1e3), "NVLink"),
        (16, FAST._replace(network=1e3), "network"),
        (16, FAST._replace(nvlink=1e2, network=1e3), "NVLink"),
    ],
)
def test_what_bounds_an_entry(memory: TrainingMemory, gpus: int, rates: Rates, bound: str):
    for strategy in ("ddp", "fsdp"):
        assert entry(memory, strategy, gpus, rates).bound == bound


@pytest.mark.slow
def test_the_table_has_a_row_for_each_strategy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = "simulate_scale.py --model 8B --gpus 1 --gpus 8 --budget 20GB --bits 4 --tokens 2048"
    monkeypatch.setattr(sys, "argv", command.split())
    simulate_scale.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in cells] == [["8B", "1", "one GPU"], ["8B", "8", "ddp"], ["8B", "8", "fsdp"]]
    assert all(len(row) == len(cells[0]) for row in cells)
    monkeypatch.setattr(sys, "argv", command.replace("20GB", "2GB").split())
    simulate_scale.main()
    assert capsys.readouterr().out.count("does not fit in memory") == 3
