"""Every rung of the memory ladder = the plain step on the device: losses, gradient norms and trained parameters."""

import pytest
import torch
from accelerate import Accelerator

from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.varlen_attention import VARLEN_ATTENTION
from lora_cli.training.memory_ladder import Rung
from tests.gpu.tiny_runs import error, make_ladder, make_model, make_plan, train, trained

RUNGS = [Rung(4), Rung(2), Rung(1), Rung(1, offload=True), Rung(1, parts=2), Rung(1, offload=True, parts=4)]


def skip_without_offload(rung: Rung, device: torch.device) -> None:
    if rung.offload and device.type == "cpu":
        pytest.skip("activations wait in host memory: on the CPU they are there anyway")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rung", RUNGS, ids=Rung.describe)
def test_every_rung_takes_the_same_step_in_fp64(
    rung: Rung, packing: bool, device: torch.device, accelerator: Accelerator
):
    skip_without_offload(rung, device)
    plan, results = make_plan(packing=packing), []
    for each in (Rung(), rung):
        model = make_model(device, attention=PACKED_ATTENTION if packing else "sdpa").double()
        steps = train(model, plan, accelerator, ladder=make_ladder(model, plan, each))
        results.append((trained(model), [(s.loss, s.grad_norm, s.tokens, s.supervised) for s in steps]))
    (expected, figures), (found, others) = results
    for one, other in zip(figures, others, strict=True):
        assert one == pytest.approx(other, rel=1e-6)  # the loss is summed in fp32
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kernel_dtype", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize("rung", RUNGS, ids=Rung.describe)
def test_every_rung_takes_the_same_step_with_the_kernel_and_dropout(
    rung: Rung, kernel_dtype: torch.dtype, device: torch.device, accelerator: Accelerator
):
    """Recomputation draws the dropout of the first pass again; parts of a batch draw another one."""
    skip_without_offload(rung, device)
    plan, losses, weights = make_plan(), [], []
    for each in (Rung(), rung):
        dropout = 0.0 if rung.parts > 1 else 0.2
        model = make_model(device, attention=VARLEN_ATTENTION, dtype=kernel_dtype, dropout=dropout)
        steps = train(model, plan, accelerator, total=1, ladder=make_ladder(model, plan, each))
        losses.append([(s.loss, s.grad_norm) for s in steps])
        weights.append(torch.cat([w.flatten() for w in trained(model)]))
    close = 1e-5 if kernel_dtype == torch.float32 else 2e-2
    assert losses[0] == [pytest.approx(figures, rel=close) for figures in losses[1]]
    assert error(weights[1], weights[0]) < 2 * close
