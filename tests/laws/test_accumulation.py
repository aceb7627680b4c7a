"""Law: a step's gradient is that of the mean loss over its supervised tokens, however its rows are batched."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.data.batches import BatchPlan
from lora_cli.model import packed_attention
from lora_cli.recipe.schema import TrainingSpec
from lora_cli.training.loop import Step, fit
from tests.model import zoo

LENGTHS = [3, 41, 12, 7, 30, 2, 19, 8, 25, 11, 5, 17]
# transformers computes RMS norms and the softmax of eager attention in fp32 for every dtype. Only a family without
# them, GPT-NeoX with sdpa, can reach 1e-12.
PRECISIONS = [("llama", torch.float32, 1e-5), ("gpt-neox", torch.float64, 1e-12)]
# Ways to batch the twelve rows of one step: (packing, batch size in tokens or rows, expected number of batches).
LAYOUTS = {
    "packed in one": (True, sum(LENGTHS), 1),
    "packed in several": (True, 50, 4),
    "padded in one": (False, 12, 1),
    "padded 4x3": (False, 3, 4),
    "padded 12x1": (False, 1, 12),
}


class Recorder(torch.optim.SGD):
    """An optimizer that records the gradients of its last step."""

    def step(self, closure: None = None) -> None:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def one_step(layout: str, model: PeftModel) -> tuple[Step, list[torch.Tensor]]:
    packing, size, batches = LAYOUTS[layout]
    model.get_base_model().set_attn_implementation(packed_attention.PACKED_ATTENTION if packing else "sdpa")
    assert zoo.fused_layers(model)
    plan = BatchPlan(zoo.rows_of(LENGTHS), packing=packing, size=size, batches_per_step=batches, seed=0)
    assert (plan.batches_per_epoch, plan.steps_per_epoch) == (batches, 1)
    optimizer = Recorder([p for p in model.parameters() if p.requires_grad], lr=0.0)
    spec = TrainingSpec(max_grad_norm=None)
    (step,) = fit(model, plan, spec=spec, optimizer=optimizer, accelerator=Accelerator(cpu=True), total=1)
    return step, optimizer.gradients


@pytest.mark.parametrize(("family", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_gradient_of_row_by_row_losses(
    layout: str, family: str, dtype: torch.dtype, tolerance: float
):
    model = zoo.adapted(zoo.make(family, dtype=dtype, attention="sdpa"))
    trained = [p for p in model.parameters() if p.requires_grad]
    total, count = zoo.loss_row_by_row(model, zoo.rows_of(LENGTHS))
    expected = torch.autograd.grad(total / count, trained)
    step, gradients = one_step(layout, model)
    assert (step.supervised, step.tokens) == (count, sum(LENGTHS))
    assert step.loss == pytest.approx(total.item() / count, rel=1e-6)
    norm = torch.stack([g.norm() for g in expected]).norm()
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert zoo.relative(gradient, reference) < tolerance
