"""The loss scale of float16: small gradients are kept, and a step that overflows is taken again, counted and told."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training import loss_scale
from lora_cli.training.loop import Step, fit
from lora_cli.training.loss_scale import GROWTH_INTERVAL, HIGHEST, START, LossScale
from tests.model import zoo


def train(model: PeftModel, scale: LossScale | None, *, on_spike: str = "warn") -> list[Step]:
    plan = BatchPlan(zoo.rows_of([3, 9, 30, 12, 7, 5]), packing=True, size=40, batches_per_step=1, seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    spec = TrainingSpec.model_validate({"learning_rate": 1e-2, "warmup": 0, "on_spike": on_spike})
    accelerator = Accelerator(cpu=True)
    return list(fit(model, plan, spec=spec, optimizer=optimizer, accelerator=accelerator, total=4, scale=scale))


def make_model() -> PeftModel:
    return zoo.adapted(zoo.make("llama", attention="lora_rows")).double()


def trained(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def overflow(model: PeftModel, *, above: float, scale: LossScale) -> None:
    """Have a gradient overflow while the scale is above a value, as in float16."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * torch.inf if scale.value > above else grad)


def test_steps_are_the_same_at_any_scale():
    results = []
    for scale in (None, LossScale(enabled=True)):
        model = make_model()
        steps = train(model, scale)
        results.append((trained(model), [(step.loss, step.grad_norm) for step in steps]))
    (expected, figures), (found, others) = results
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(expected, found, strict=True))
    assert all(one == pytest.approx(other, rel=1e-9) for one, other in zip(figures, others, strict=True))


def test_a_step_that_overflows_is_taken_again_with_half_the_scale():
    expected, model = make_model(), make_model()
    train(expected, None)
    scale = LossScale(enabled=True)
    overflow(model, above=START / 4, scale=scale)
    steps = train(model, scale)
    assert [step.overflows for step in steps] == [2, 0, 0, 0]
    assert (scale.value, scale.overflows) == (START / 4, 2)
    assert steps[0].record()["overflows"] == 2
    assert "overflows" not in steps[1].record()
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(trained(expected), trained(model), strict=True))


def test_a_gradient_that_no_scale_makes_finite_is_an_error():
    model, scale = make_model(), LossScale(enabled=True)
    before = trained(model)
    overflow(model, above=0, scale=scale)
    with pytest.raises(LoraError, match="step 1: the gradient is not finite"):
        train(model, scale)
    assert (scale.value, scale.overflows) == (START, 0)  # it was no overflow
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


def test_a_skipped_step_of_nan_leaves_the_scale_as_it_was():
    model, scale, calls = make_model(), LossScale(enabled=True), []
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def nan_in_step_2(grad: torch.Tensor) -> torch.Tensor:
        calls.append(scale.value)
        return grad * torch.nan if 1 < len(calls) < 23 else grad

    parameter.register_hook(nan_in_step_2)
    steps = train(model, scale, on_spike="skip")
    assert calls[1:22] == [START / 2**n for n in range(21)]
    assert [bool(step.spike) for step in steps] == [False, True, False, False]
    assert [step.overflows for step in steps] == [0] * 4
    assert scale.value == calls[-1] == START


def test_without_float16_an_overflow_is_an_error_at_once():
    model, scale = make_model(), LossScale(enabled=False)
    overflow(model, above=0, scale=scale)
    with pytest.raises(LoraError, match="step 1: the gradient is not finite"):
        train(model, scale)
    assert (scale.value, scale.overflows) == (1, 0)


def test_the_scale_grows_after_many_steps_up_to_a_limit():
    scale = LossScale(enabled=True)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.count_step()
    assert scale.value == START
    scale.count_step()
    assert scale.value == 2 * START
    for _ in range(20 * GROWTH_INTERVAL):
        scale.count_step()
    assert scale.value == HIGHEST


def test_a_resumed_run_goes_on_with_the_scale_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scales = [LossScale(enabled=True), LossScale(enabled=True)]
    scales[0].lower()
    for _ in range(2):
        scales[0].count_step()
    scales[1].restore(scales[0].to_json())
    for scale in scales:
        scale.count_step()
    assert scales[0].to_json() == scales[1].to_json() == {"value": START, "overflows": 1, "steps": 0}
