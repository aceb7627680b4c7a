"""The training loop `fit`: clipping, gradient checkpointing, non-finite values, and batches without labels."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import packed_attention
from lora_cli.recipe.schema import TrainingSpec
from lora_cli.training import loop
from lora_cli.training.loop import Step, fit
from lora_cli.training.loss_spikes import MAX_SKIPPED_IN_A_ROW, MIN_STEPS, LossSpikes
from lora_cli.training.lr_schedule import learning_rate
from lora_cli.training.optimizer import make_optimizer
from tests.model import zoo

LENGTHS = [3, 41, 12, 7, 30, 2, 19, 8, 25, 11, 5, 17]


def make_model(**spec: object) -> PeftModel:
    return zoo.adapted(zoo.make("llama", attention=packed_attention.PACKED_ATTENTION), **spec)


def parameters(model: PeftModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def run(model: PeftModel, plan: BatchPlan, *, total: int, start: int = 0, **spec: object) -> list[Step]:
    training = TrainingSpec.model_validate({"learning_rate": 1e-2, "schedule": "constant", "warmup": 0, **spec})
    optimizer = make_optimizer(model, training)
    accelerator = Accelerator(cpu=True)
    return list(fit(model, plan, spec=training, optimizer=optimizer, accelerator=accelerator, total=total, start=start))


def plan_of(lengths: Sequence[int] = LENGTHS, *, batches_per_step: int = 2, size: int = 50) -> BatchPlan:
    return BatchPlan(zoo.rows_of(lengths), packing=True, size=size, batches_per_step=batches_per_step, seed=1)


def test_training_lowers_the_loss_and_changes_only_the_adapter():
    model = make_model(dropout=0.1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = parameters(model)
    steps = run(model, plan_of(), total=30)
    assert sum(s.loss for s in steps[-4:]) < 0.8 * sum(s.loss for s in steps[:4])
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert [s.number for s in steps] == list(range(1, 31))
    assert steps[1].epoch == 1.0  # four batches, two a step
    assert steps[0].tokens + steps[1].tokens == sum(LENGTHS)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packing", [True, False])
def test_gradient_checkpointing_changes_nothing(dropout: float, packing: bool):
    results = []
    for recompute in (False, True):
        model = make_model(dropout=dropout)
        base = model.get_base_model()
        calls: list[int] = []
        # A pre-hook, because the recomputation may stop before the forward hooks.
        base.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if not packing:
            base.set_attn_implementation("sdpa")
        if recompute:
            base.activation_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        plan = BatchPlan(zoo.rows_of(LENGTHS), packing=packing, size=50 if packing else 4, batches_per_step=2, seed=1)
        steps = run(model, plan, total=3)
        results.append((parameters(model), [(s.loss, s.grad_norm) for s in steps], len(calls)))
    off, on = results
    assert on[2] > off[2]  # the forward pass was computed again
    assert on[1] == off[1]
    assert all(torch.equal(a, b) for a, b in zip(off[0], on[0], strict=True))


def test_clipping_scales_the_gradient_to_max_grad_norm():
    steps, changes = [], []
    for limit in (None, 1e-3):
        model = make_model()
        before = parameters(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        spec = TrainingSpec(learning_rate=1.0, schedule="constant", warmup=0, max_grad_norm=limit)
        accelerator = Accelerator(cpu=True)
        steps += list(fit(model, plan_of(), spec=spec, optimizer=optimizer, accelerator=accelerator, total=1))
        changes.append(torch.cat([(a - b).flatten() for a, b in zip(before, parameters(model), strict=True)]))
    assert steps[0].grad_norm == steps[1].grad_norm > 1e-2  # the reported norm is that before clipping
    assert float(changes[0].norm()) == pytest.approx(steps[0].grad_norm, rel=1e-4)
    assert float(changes[1].norm()) == pytest.approx(1e-3, rel=1e-2)


def make_a_weight_infinite(model: PeftModel) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.inf


def make_a_gradient_nan(model: PeftModel) -> None:
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * torch.nan)


@pytest.mark.parametrize(("damage", "quantity"), [(make_a_weight_infinite, "loss"), (make_a_gradient_nan, "gradient")])
def test_a_non_finite_loss_or_gradient_raises_before_the_update(damage: Callable[[PeftModel], None], quantity: str):
    model, plan = make_model(), plan_of()
    training = TrainingSpec(learning_rate=1e-2)
    optimizer = make_optimizer(model, training)
    accelerator = Accelerator(cpu=True)
    steps = fit(model, plan, spec=training, optimizer=optimizer, accelerator=accelerator, total=9)
    next(steps)
    next(steps)
    damage(model)
    before, moments = parameters(model), [v.clone() for s in optimizer.state.values() for v in s.values()]
    with pytest.raises(LoraError) as caught:
        next(steps)
    rows = [plan.rows[i].where for _, batch in plan.batches_of_step(2) for i in batch.rows]
    message = caught.value.message
    assert message.startswith(f"step 3: the {quantity} is not finite; its rows: {rows[0]}, ")
    assert [row for row in rows[:5] if row not in message] == []
    assert f"and {len(rows) - 5} more" in message or len(rows) <= 5
    assert caught.value.exit_code == 1
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    after = [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_the_error_lists_only_the_rows_of_the_batch_with_the_non_finite_loss():
    model, plan = make_model(), plan_of()
    (_, good), (_, bad) = plan.batches_of_step(0)
    token = next(int(t) for t in bad.input_ids[0] if t not in good.input_ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    with pytest.raises(LoraError) as caught:
        run(model, plan, total=1)
    rows = [plan.rows[i].where for i in bad.rows]
    assert caught.value.message.endswith("its rows: " + ", ".join(rows[:5]) + _and_more(rows))


def _and_more(rows: list[str]) -> str:
    return f" and {len(rows) - 5} more" if len(rows) > 5 else ""


@pytest.mark.parametrize("ending", ["last step", "the loop is left", "an error"])
def test_the_neftune_noise_is_removed_when_training_ends(ending: str):
    model, spec = make_model(), TrainingSpec.model_validate({"neftune_alpha": 5.0})
    embeddings = model.get_base_model().get_input_embeddings()
    steps = fit(
        model, plan_of(), spec=spec, optimizer=make_optimizer(model, spec), accelerator=Accelerator(cpu=True), total=2
    )
    next(steps)
    assert len(embeddings._forward_hooks) == 1
    if ending == "last step":
        assert len(list(steps)) == 1
    elif ending == "the loop is left":
        steps.close()  # as Python does when a `for` over it is left and nothing else refers to it
    else:
        make_a_weight_infinite(model)
        with pytest.raises(LoraError, match="not finite"):
            next(steps)
    assert not embeddings._forward_hooks


def test_batches_without_a_label_are_skipped():
    rows = zoo.rows_of([20, 20, 20])
    rows[1].labels[:] = -100
    plan = BatchPlan(rows, packing=False, size=1, batches_per_step=3, seed=0)
    model = make_model()
    model.get_base_model().set_attn_implementation("sdpa")
    (step,) = run(model, plan, total=1)
    total, count = zoo.loss_row_by_row(zoo.adapted(zoo.make("llama")), zoo.MemoryRows([rows[0], rows[2]]))
    assert (step.supervised, step.tokens) == (count, 60)
    assert step.loss == pytest.approx(total.item() / count, rel=1e-5)


def test_a_step_without_any_label_changes_no_parameter():
    rows = zoo.rows_of([20, 20])
    for row in (rows[0], rows[1]):
        row.labels[:] = -100
    model = make_model()
    before = parameters(model)
    (step,) = run(model, BatchPlan(rows, packing=True, size=40, batches_per_step=1, seed=0), total=1)
    assert (step.supervised, step.loss) == (0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_fp16_gradients_of_a_large_step_do_not_vanish(monkeypatch: pytest.MonkeyPatch):
    """In a step of 10,000 batches, the gradient of one batch is 10,000 times smaller; it must stay as exact."""
    monkeypatch.setattr(loop, "all_reduce_sum", lambda _, value: value if value.is_floating_point() else 10_000 * value)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        fp16_model = zoo.make("llama", dtype=torch.float16, attention="sdpa", initializer_range=0.05)
        model = zoo.adapted(fp16_model.to(dtype))  # the same values in both dtypes
        plan = BatchPlan(zoo.rows_of(LENGTHS), packing=False, size=4, batches_per_step=3, seed=1)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.0)
        parts: list[Tensor] = []
        optimizer.register_step_pre_hook(
            lambda *_, weights=weights, parts=parts: parts.extend(p.grad.flatten() for p in weights)
        )
        spec = TrainingSpec(max_grad_norm=None)
        list(fit(model, plan, spec=spec, optimizer=optimizer, accelerator=Accelerator(cpu=True), total=1))
        gradients.append(torch.cat(parts))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.02


ODD = "rows.jsonl:24"


def plan_with_an_odd_row(model: PeftModel) -> BatchPlan:
    """Return a plan of one row a batch: equal rows, and after 16 steps one whose loss is far above theirs."""
    rows = list(zoo.rows_of([12] * 40))
    with torch.no_grad():
        summed = [zoo.loss_row_by_row(model, zoo.MemoryRows([row])) for row in rows]
    losses = [float(loss) / count for loss, count in summed]
    usual, odd = rows[int(np.argmin(losses))], rows[int(np.argmax(losses))]
    assert max(losses) > 1.5 * min(losses)
    equal = zoo.MemoryRows([usual._replace(where=f"rows.jsonl:{n + 1}") for n in range(23)] + [odd._replace(where=ODD)])
    plans = (BatchPlan(equal, packing=False, size=1, batches_per_step=1, seed=seed) for seed in range(99))
    return next(plan for plan in plans if MIN_STEPS <= plan.epoch(0).index([23]) < 22)


def make_model_of_varied_losses() -> PeftModel:
    return zoo.adapted(zoo.make("llama", initializer_range=1.0))


def test_a_loss_spike_is_told_and_trained_on():
    model = make_model_of_varied_losses()
    plan = plan_with_an_odd_row(model)
    steps = run(model, plan, total=24, learning_rate=1e-5)
    position = plan.epoch(0).index([23])
    assert [step.number for step in steps if step.spike] == [position + 1]
    spiked = steps[position]
    assert spiked.spike
    assert spiked.spike.rows == [ODD]
    assert not spiked.spike.skipped
    line = spiked.spike.line(spiked.number)
    assert line.startswith(f"step {position + 1}: the loss {spiked.loss:.4f} is a spike, ")
    assert line.endswith(f"; its rows: {ODD}")
    mean = sum(step.loss for step in steps[:position]) / position
    assert spiked.spike.mean == pytest.approx(mean)
    assert spiked.record()["spike"] == {"mean": spiked.spike.mean, "sigma": spiked.spike.sigma}
    assert "spike" not in steps[0].record()


def test_a_skipped_step_changes_neither_parameters_nor_optimizer_and_counts():
    model = make_model_of_varied_losses()
    plan = plan_with_an_odd_row(model)
    spec = TrainingSpec(learning_rate=1e-3, on_spike="skip")
    optimizer, spikes = make_optimizer(model, spec), LossSpikes()
    states, steps = [], []
    for step in fit(
        model, plan, spec=spec, optimizer=optimizer, accelerator=Accelerator(cpu=True), total=24, spikes=spikes
    ):
        states.append([*parameters(model), *(v.clone() for s in optimizer.state.values() for v in s.values())])
        steps.append(step)
    position = plan.epoch(0).index([23])
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(states)]
    assert changed == [number != position for number in range(1, 24)]
    assert [step.number for step in steps] == list(range(1, 25))
    assert [step.learning_rate for step in steps] == [learning_rate(n, spec=spec, total=24) for n in range(24)]
    assert (spikes.count, spikes.skipped) == (1, 1)
    assert steps[position].spike
    assert steps[position].spike.line(9).endswith("; skipped: the weights stay as they were (training.on_spike)")
    assert steps[position].record()["skipped"] is True


def test_the_rows_of_a_spike_are_those_of_the_batch_with_the_highest_loss():
    model = make_model_of_varied_losses()
    plan = plan_with_an_odd_row(model)
    plan.batches_per_step, plan.steps_per_epoch = 2, 12
    spikes = LossSpikes()
    losses = [step.loss for step in run(model, plan, total=4, learning_rate=1e-9)] * 4
    spikes.restore({**spikes.to_json(), "losses": losses})
    spec = TrainingSpec(learning_rate=1e-5)
    optimizer = make_optimizer(model, spec)
    steps = list(
        fit(model, plan, spec=spec, optimizer=optimizer, accelerator=Accelerator(cpu=True), total=12, spikes=spikes)
    )
    assert [step.spike.rows for step in steps if step.spike] == [[ODD]]


@pytest.mark.parametrize(("damage", "quantity"), [(make_a_weight_infinite, "loss"), (make_a_gradient_nan, "gradient")])
def test_with_skip_a_step_that_is_not_finite_is_skipped_and_too_many_in_a_row_are_an_error(
    damage: Callable[[PeftModel], None], quantity: str
):
    model, plan = make_model(), plan_of()
    spec = TrainingSpec(learning_rate=1e-2, on_spike="skip")
    optimizer, spikes = make_optimizer(model, spec), LossSpikes()
    accelerator = Accelerator(cpu=True)
    steps = fit(model, plan, spec=spec, optimizer=optimizer, accelerator=accelerator, total=99, spikes=spikes)
    next(steps)
    damage(model)
    before = [*parameters(model), *(v.clone() for s in optimizer.state.values() for v in s.values())]
    for number in range(2, 2 + MAX_SKIPPED_IN_A_ROW):
        step = next(steps)
        assert step.spike
        assert step.spike.line(step.number).startswith(f"step {number}: the {quantity} is not finite; its rows: rows.")
        record = json.loads(json.dumps(step.record(), allow_nan=False))
        assert (record["loss"] if quantity == "loss" else record["grad_norm"]) is None
        assert record["spike"] == {"mean": None, "sigma": None}
    with pytest.raises(LoraError, match=f"step 10: the {quantity} is not finite, and so were the 8 steps before it"):
        next(steps)
    after = [*parameters(model), *(v for s in optimizer.state.values() for v in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(spikes.to_json()["losses"]) == 1  # only those that are finite


class ReadsOfSingleValues(TorchDispatchMode):
    """Counts `float(tensor)`, `bool(tensor)` and `tensor.item()`: on a GPU, the host waits for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_read_single_values_of_a_step():
    model = make_model()
    with ReadsOfSingleValues() as reads:
        run(model, plan_of(), total=3)
    assert reads.count == 0
