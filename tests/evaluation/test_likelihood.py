"""Likelihood equals transformers' own loss, for any batching and any number of processes."""

import math

import pytest
import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.evaluation.likelihood import Likelihood, measure_likelihood, measure_row_likelihoods
from lora_cli.model import packed_attention
from lora_cli.model.loss import LossFunction
from tests.model import zoo

ROWS = zoo.rows_of([3, 41, 12, 7, 30, 2, 19, 8, 25, 11])


@torch.no_grad()
def reference(model: torch.nn.Module) -> Likelihood:
    total, count = zoo.loss_row_by_row(model, ROWS)
    correct = 0
    for i in range(len(ROWS)):
        row = ROWS[i]
        best = model(input_ids=torch.tensor(row.input_ids[None].astype("int64"))).logits[0].argmax(-1)
        correct += sum(
            int(best[t]) == int(row.labels[t + 1]) for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100
        )
    return Likelihood(float(total) / count, correct / count, count)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("packing", "size"), [(True, 41), (True, 1000), (False, 1), (False, 4)])
def test_the_likelihood_equals_the_loss_of_the_rows_one_by_one(family: str, packing: bool, size: int):
    model = zoo.adapted(zoo.make(family), dropout=0.5)
    expected = reference(model.eval())
    if family == "llama":
        model.get_base_model().set_attn_implementation(packed_attention.PACKED_ATTENTION if packing else "sdpa")
    likelihood = measure_likelihood(
        LossFunction(model.train()), BatchPlan(ROWS, packing=packing, size=size, batches_per_step=1, seed=0)
    )
    assert likelihood.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (likelihood.accuracy, likelihood.tokens) == (expected.accuracy, expected.tokens)
    by_row = measure_row_likelihoods(
        LossFunction(model.train()), BatchPlan(ROWS, packing=packing, size=size, batches_per_step=1, seed=0)
    )
    assert by_row.overall == pytest.approx(likelihood, rel=1e-6)
    for i in range(len(ROWS)):
        row_plan = BatchPlan(zoo.MemoryRows([ROWS[i]]), packing=packing, size=50, batches_per_step=1, seed=0)
        alone = measure_likelihood(LossFunction(model), row_plan)
        assert by_row.units[i] == alone.tokens
        assert by_row.correct[i] == pytest.approx((alone.accuracy or 0.0) * alone.tokens)
        assert by_row.loss[i] == pytest.approx(alone.loss * alone.tokens, rel=1e-5, abs=1e-6)
    assert likelihood.perplexity == pytest.approx(math.exp(expected.loss), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_keeps_the_training_mode_and_records_no_gradient(training: bool):
    model = zoo.adapted(zoo.make("llama")).train(training)
    measure_likelihood(LossFunction(model), BatchPlan(ROWS, packing=False, size=3, batches_per_step=1, seed=0))
    assert {module.training for module in model.get_base_model().modules()} == {training}
    assert all(p.grad is None for p in model.parameters())


class FakeAccelerator:
    """An Accelerator of one process out of `world`; `reduce` records the value that this process contributes."""

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes = rank, world

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.contribution = value
        return value


def test_the_sums_of_the_processes_add_up():
    loss_fn, plan = LossFunction(zoo.make("llama")), BatchPlan(ROWS, packing=False, size=3, batches_per_step=1, seed=0)
    processes = [FakeAccelerator(rank, 3) for rank in range(3)]
    for process in processes:
        measure_likelihood(loss_fn, plan, accelerator=process)
    loss, correct, tokens = torch.stack([process.contribution for process in processes]).sum(0).tolist()
    single = measure_likelihood(loss_fn, plan)
    assert (correct / tokens, tokens) == (single.accuracy, single.tokens)
    assert loss / tokens == pytest.approx(single.loss, rel=1e-12)


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (699.0, math.exp(699.0)), (800.0, math.inf)])
def test_perplexity_never_overflows(loss: float, perplexity: float):
    assert Likelihood(loss, 0.0, 1).perplexity == perplexity


def test_rows_without_a_supervised_token_do_not_divide_by_zero():
    rows = zoo.rows_of([4])
    rows[0].labels[:] = -100
    assert (
        measure_likelihood(
            LossFunction(zoo.make("llama")), BatchPlan(rows, packing=False, size=1, batches_per_step=1, seed=0)
        ).tokens
        == 0
    )
