"""Packed rows = separate rows on the device: logits, gradients of the adapter, and no gradient from row to row.

The tolerance of a dtype is the rounding of separate rows in it: packing may add a part of that, and no other error.
"""

import pytest
import torch
from torch import Tensor

from lora_cli.data.collate import Batch, collate_packed
from lora_cli.model.loss import LossFunction
from lora_cli.model.packed_attention import LONG_ROW, PACKED_ATTENTION
from lora_cli.model.varlen_attention import VARLEN_ATTENTION
from tests.gpu.tiny_runs import error, make_model
from tests.laws.test_packing import logits_packed, logits_separate, packed
from tests.model import zoo

LENGTHS = [9, 1, 30, LONG_ROW + 5, 5, 29]
MARGIN = 3.0  # times the rounding of separate rows
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # where separate rows round less by chance
KERNEL_DTYPES = pytest.mark.parametrize("kernel_dtype", FLOOR, indirect=True)


def on_device(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(input_ids=batch.input_ids.to(device))


def assert_rounds_as_much(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Assert that `found` is as close to `exact`, in fp64, as `plain` is, the same in `dtype` by the plain way."""
    assert error(found, exact) <= MARGIN * error(plain, exact) + FLOOR[dtype]


@torch.no_grad()
def assert_logits_of_separate_rows(family: str, attention: str, dtype: torch.dtype, device: torch.device) -> None:
    model, batch = zoo.make(family, dtype=dtype).to(device), on_device(packed(LENGTHS), device)
    model.set_attn_implementation(attention)
    found = logits_packed(model, batch)
    separate = logits_separate(model, batch)
    exact = logits_separate(zoo.make(family, dtype=dtype).to(device).double(), batch)
    assert_rounds_as_much(found, separate, exact, dtype)


@KERNEL_DTYPES
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "deepseek3"])
def test_the_kernel_gives_the_logits_of_separate_rows(family: str, kernel_dtype: torch.dtype, device: torch.device):
    assert_logits_of_separate_rows(family, VARLEN_ATTENTION, kernel_dtype, device)


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("attention", [PACKED_ATTENTION, "sdpa"])
def test_other_attention_gives_the_logits_of_separate_rows(attention: str, dtype: torch.dtype, device: torch.device):
    assert_logits_of_separate_rows("mistral", attention, dtype, device)


def gradients(
    batches: list[Batch], *, attention: str, dtype: torch.dtype, device: torch.device, exact: bool = False
) -> Tensor:
    """Return the gradients of the summed loss of `batches` by all trained parameters, in one vector.

    `exact` computes them in fp64, with the weights rounded to `dtype` as otherwise.
    """
    model = make_model(device, attention=attention, dtype=dtype)
    loss_fn = LossFunction(model.double() if exact else model)
    for batch in batches:
        loss_fn(batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@KERNEL_DTYPES
def test_the_kernel_gives_the_gradients_of_separate_rows(kernel_dtype: torch.dtype, device: torch.device):
    batch, rows = packed(LENGTHS), zoo.rows_of(LENGTHS)
    separate = [collate_packed([rows[i]], [i], 0) for i in range(len(rows))]
    found = gradients([batch], attention=VARLEN_ATTENTION, dtype=kernel_dtype, device=device)
    plain = gradients(separate, attention="eager", dtype=kernel_dtype, device=device)
    exact = gradients(separate, attention="eager", dtype=kernel_dtype, device=device, exact=True)
    assert float(exact.norm()) > 0
    assert_rounds_as_much(found, plain, exact, kernel_dtype)


@KERNEL_DTYPES
def test_no_gradient_flows_from_row_to_row(kernel_dtype: torch.dtype, device: torch.device):
    model = zoo.make("llama", dtype=kernel_dtype, attention=VARLEN_ATTENTION).to(device)
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda layer, args, out: embedded.append(out.requires_grad_()) or out
    )
    logits = logits_packed(model, packed(LENGTHS)).split(LENGTHS)
    for number, row in enumerate(logits):
        (gradient,) = torch.autograd.grad(row.float().square().sum(), embedded[-1], retain_graph=True)
        reached = [bool(part.abs().max() > 0) for part in gradient[0].split(LENGTHS)]
        assert reached == [other == number for other in range(len(LENGTHS))]
