"""The memory ladder: the same step in forms that need less memory, taken when a step runs out, with nothing lost."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training import memory_ladder
from lora_cli.training.loop import Step, fit
from lora_cli.training.memory_ladder import MemoryLadder, Rung, StartAgain, all_rungs
from tests.model import zoo

LENGTHS = [3, 9, 30, 12, 7, 5, 21, 14, 2, 33]
OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError,
]


def make_ladder(model: PeftModel, plan: BatchPlan, told: list[str] | None = None, **options: Any) -> MemoryLadder:
    defaults = {"setting": "auto", "can_recompute": True, "use_reentrant": False, "reserve": 0}
    info = (told if told is not None else []).append
    return MemoryLadder(model.get_base_model(), max_parts=plan.max_rows, info=info, **(defaults | options))


def make_plan(packing: bool = True) -> BatchPlan:
    return BatchPlan(zoo.rows_of(LENGTHS), packing=packing, size=40 if packing else 4, batches_per_step=2, seed=1)


def make_model(packing: bool = True, **spec: Any) -> PeftModel:
    model = zoo.adapted(zoo.make("llama", attention="lora_rows" if packing else "sdpa"), **spec)
    return model.double()


def train(model: PeftModel, plan: BatchPlan, ladder: MemoryLadder | None, *, total: int = 3) -> list[Step]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    spec, accelerator = TrainingSpec(learning_rate=1e-2, warmup=0), Accelerator(cpu=True)
    steps = fit(model, plan, spec=spec, optimizer=optimizer, accelerator=accelerator, total=total, ladder=ladder)
    return list(steps)


def trained(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rung", [Rung(), Rung(4), Rung(2), Rung(1), Rung(1, parts=2), Rung(1, parts=8)])
def test_every_rung_takes_the_same_step(rung: Rung, packing: bool):
    plan, results = make_plan(packing), []
    for each in (None, rung):
        model = make_model(packing)
        ladder = make_ladder(model, plan)
        if each is not None:
            ladder.set(each)
        steps = train(model, plan, ladder)
        results.append((trained(model), [(s.loss, s.grad_norm, s.tokens, s.supervised) for s in steps]))
    (expected, figures), (found, other) = results
    for a, b in zip(figures, other, strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # the loss is summed in fp32
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_step_that_runs_out_is_taken_again(error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch):
    """The second batch of step 2 runs out twice: its first batch has left gradients, which must not count."""
    plan, told = make_plan(), []
    expected = make_model()
    train(expected, plan, None)
    model = make_model()
    ladder = make_ladder(model, plan, told)
    calls, compute = [], LossFunction.__call__

    def run_out(self: LossFunction, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) in (4, 6):
            raise error()
        return compute(self, batch)

    monkeypatch.setattr(LossFunction, "__call__", run_out)
    steps = train(model, plan, ladder)
    assert [step.number for step in steps] == [1, 2, 3]
    assert told == [
        "step 2 ran out of memory: every 4th layer is recomputed from here on",
        "step 2 ran out of memory: every 2nd layer is recomputed from here on",
    ]
    assert ladder.rung == Rung(2)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(trained(expected), trained(model), strict=True))


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch):
    plan = make_plan()
    expected = make_model()
    train(expected, plan, None)
    model, failed = make_model(), []
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def fail_once(grad: torch.Tensor) -> torch.Tensor:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grad

    parameter.register_hook(fail_once)
    train(model, plan, make_ladder(model, plan))
    assert failed
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(trained(expected), trained(model), strict=True))


def test_the_last_rung_ends_in_one_error(monkeypatch: pytest.MonkeyPatch):
    plan, told = make_plan(), []
    model = make_model()
    before = trained(model)

    def run_out(self: LossFunction, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LossFunction, "__call__", run_out)
    with pytest.raises(LoraError, match="too little memory for step 1: every layer is recomputed, batches are run in"):
        train(model, plan, make_ladder(model, plan, told))
    assert len(told) == 3 + math.ceil(math.log2(plan.max_rows))  # layers; 2, 4, ... parts, down to single rows
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch):
    def fail(self: LossFunction, batch: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(LossFunction, "__call__", fail)
    plan, model = make_plan(), make_model()
    with pytest.raises(RuntimeError, match="a bug"):
        train(model, plan, make_ladder(model, plan))


def test_the_setting_of_the_recipe_bounds_the_ladder():
    def rungs(setting: bool | str, *, can_recompute: bool = True, on_cpu: bool = False, cheap: int = 1) -> list[Rung]:
        options = {"can_recompute": can_recompute, "on_cpu": on_cpu, "max_parts": 3}
        return all_rungs(setting=setting, parts_first=cheap, **options)

    offloaded = Rung(1, offload=True)
    parts = [offloaded._replace(parts=2), offloaded._replace(parts=4)]  # the last has single rows
    assert rungs("auto") == [Rung(), Rung(4), Rung(2), Rung(1), offloaded, *parts]
    assert rungs("auto", on_cpu=True) == [Rung(), Rung(4), Rung(2), Rung(1), Rung(1, parts=2), Rung(1, parts=4)]
    assert rungs(True) == [Rung(1), offloaded, *parts]
    assert rungs(False) == rungs("auto", can_recompute=False) == [Rung(), Rung(parts=2), Rung(parts=4)]
    # A batch that is a whole step is first divided into as many parts as the recipe accumulates.
    assert rungs("auto", on_cpu=True, cheap=3) == [
        Rung(),
        Rung(parts=2),
        Rung(parts=3),
        *(Rung(every, parts=3) for every in (4, 2, 1)),
    ]
    assert rungs(True, cheap=2) == [
        Rung(1),
        Rung(1, parts=2),
        Rung(1, offload=True, parts=2),
        Rung(1, offload=True, parts=4),
    ]
    assert rungs(False, cheap=3) == [Rung(), Rung(parts=2), Rung(parts=3)]


def test_a_model_that_cannot_recompute_is_refused_where_the_recipe_asks_for_it():
    model = make_model()
    type(model.get_base_model()).supports_gradient_checkpointing = False
    try:
        with pytest.raises(LoraError, match="gradient_checkpointing: llama models cannot recompute their layers"):
            make_ladder(model, make_plan(), setting=True)
        assert make_ladder(model, make_plan()).below()[0] == Rung(parts=2)
    finally:
        type(model.get_base_model()).supports_gradient_checkpointing = True


class Rehearsal:
    """A largest batch that fits from some rung on."""

    def __init__(self, ladder: MemoryLadder, fits: Callable[[Rung], bool]) -> None:
        self.ladder, self.fits, self.tried = ladder, fits, list[Rung]()

    def __call__(self) -> None:
        self.tried.append(self.ladder.rung)
        if not self.fits(self.ladder.rung):
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_the_largest_batch_is_tried_before_the_first_step():
    plan, model, told = make_plan(), make_model(), []
    ladder = make_ladder(model, plan, told, reserve=100)
    batch = Rehearsal(ladder, lambda rung: rung.every == 1)
    ladder.rehearse(batch, Accelerator(cpu=True), tokens=60, started=False)
    assert batch.tried == [Rung(), Rung(4), Rung(2), Rung(1)]
    assert told[0] == "the largest batch (60 tokens) ran out of memory: every 4th layer is recomputed from here on"
    assert told[-1].startswith("memory: every layer is recomputed; the largest batch (60 tokens) peaks at ")
    hopeless = Rehearsal(ladder, lambda rung: False)
    with pytest.raises(LoraError, match=r"too little memory for the largest batch \(60 tokens\)"):
        ladder.rehearse(hopeless, Accelerator(cpu=True), tokens=60, started=True)


def test_a_sharded_step_that_runs_out_names_the_next_rung(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_ladder, "is_sharded", lambda _: True)
    plan, told = make_plan(), []
    ladder = make_ladder(make_model(), plan, told)
    with pytest.raises(StartAgain, match=r"^step 7 ran out of memory: every 4th layer is recomputed from") as raised:
        ladder.start_again("step 7")
    assert (raised.value.rung, ladder.rung, told) == (Rung(4), Rung(), [])
    assert raised.value.hint
    assert "--max-restarts" in raised.value.hint
    batch = Rehearsal(ladder, lambda _: False)
    with pytest.raises(StartAgain, match=r"^the largest batch \(60 tokens\) ran out of memory: every 4th layer"):
        ladder.rehearse(batch, Accelerator(cpu=True), tokens=60, started=False)
    assert batch.tried == [Rung()]
    assert ladder.lower_to(json.loads(json.dumps(raised.value.rung._asdict())))
    assert ladder.rung == Rung(4)
    for values in (None, ladder.to_json(), dict(Rung()._asdict()), dict(Rung(3)._asdict())):
        assert not ladder.lower_to(values)
    ladder.set(ladder.below()[-1])
    with pytest.raises(LoraError, match=r"too little memory for step 8: .* smallest form") as ended:
        ladder.start_again("step 8")
    assert not isinstance(ended.value, StartAgain)


@pytest.mark.parametrize(
    ("rung", "reached"),
    [
        (Rung(4), True),
        (Rung(1), True),
        (Rung(1, offload=True), False),
        (Rung(1, parts=2), False),
        (Rung(parts=2), False),
    ],
)
def test_a_key_is_told_where_a_run_that_has_it_begins_with_a_form_as_small(rung: Rung, reached: bool):
    (first, *_) = all_rungs(setting=True, can_recompute=True, on_cpu=False, max_parts=8, parts_first=2)
    ladder = all_rungs(setting="auto", can_recompute=True, on_cpu=False, max_parts=8)
    assert (rung in ladder and ladder.index(first) >= ladder.index(rung)) is reached
    hint = str(StartAgain("step 7", rung).hint)
    assert "--max-restarts 8" in hint
    assert ("gradient_checkpointing: true" in hint) is reached
    assert ("data.max_length" in hint) is not reached


def test_what_the_optimizer_will_take_is_held_in_the_rehearsal():
    plan, model = make_plan(), make_model()
    ladder = make_ladder(model, plan, reserve=10**16)
    batch = Rehearsal(ladder, lambda rung: True)
    with pytest.raises(LoraError, match="too little memory"):
        ladder.rehearse(batch, Accelerator(cpu=True), tokens=60, started=False)
    assert batch.tried == []
    ladder.rehearse(batch, Accelerator(cpu=True), tokens=60, started=True)
    assert len(batch.tried) == 1


def test_a_resumed_run_takes_the_rung_of_its_checkpoint():
    plan = make_plan()
    ladder = make_ladder(make_model(), plan)
    ladder.restore(dict(Rung(2)._asdict()))
    assert ladder.rung == Rung(2)
    ladder.restore(dict(Rung()._asdict()))  # of a machine with more memory
    assert ladder.rung == Rung(2)


def test_a_resumed_run_whose_batches_need_more_parts_says_so():
    plan, told = make_plan(), []
    ladder = make_ladder(make_model(), plan, told, parts_first=2)
    ladder.set(Rung(parts=2))
    ladder.restore(dict(Rung(parts=2)._asdict()))
    assert told == []
    ladder.restore(dict(Rung()._asdict()))
    assert ladder.rung == Rung(parts=2)
    assert told == [
        "--resume: all activations are kept, batches are run in 2 parts; before: all activations are kept: "
        "the result differs from an uninterrupted run's by dropout and rounding"
    ]


def test_a_resumed_run_takes_as_many_parts_in_the_form_that_it_has():
    plan, told = make_plan(), []
    ladder = make_ladder(make_model(), plan, told, setting=False)
    ladder.restore(dict(Rung(1, offload=True, parts=2)._asdict()))  # of a GPU, with recomputation
    assert (ladder.rung, told) == (Rung(parts=2), [])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), parts=st.sampled_from([1, 2, 4, 8]))
def test_parts_of_a_batch_have_its_rows_once_and_similar_sizes(lengths: list[int], parts: int):
    plan = BatchPlan(zoo.rows_of(lengths), packing=True, size=sum(lengths), batches_per_step=1, seed=1)
    batch = plan.make_batch(range(len(lengths)))
    found = plan.split(batch, parts)
    assert [row for part in found for row in part.rows] == list(batch.rows)
    assert len(found) <= max(parts, 1)
    if parts >= len(lengths):
        assert len(found) == len(lengths) or parts == 1
    assert all(part.tokens for part in found)
    assert max(part.tokens for part in found) <= sum(lengths) / parts + max(lengths)
    assert sum(len(part.targets) for part in found) == len(batch.targets)


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_batch_is_that_of_the_most_tokens(packing: bool):
    plan = make_plan(packing)
    batches = [plan.make_batch(rows) for rows in plan.epoch(0)]
    assert plan.largest_batch().input_ids.numel() == max(batch.input_ids.numel() for batch in batches)
    assert plan.largest_batch().input_ids.numel() == plan.max_tokens
