"""Decoder layers are compiled where it pays, and compute what they computed; what cannot be compiled is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model.compile_layers import choose_compile, compile_layers, decoder_layers
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from tests.model import zoo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("setting", "device", "batches", "line"),
    [
        ("auto", CPU, 9999, "compile: no (on a CPU it takes minutes to start, and gains little)"),
        ("auto", GPU, 999, "compile: no (pays from 1,000 batches on; this run has 999)"),
        ("auto", GPU, 1000, "compile: each decoder layer (the run has 1,000 batches)"),
        (False, GPU, 9999, "compile: no (performance.compile)"),
        (True, CPU, 1, "compile: each decoder layer (performance.compile)"),
    ],
)
def test_the_choice_and_its_reason(setting: Any, device: torch.device, batches: int, line: str):
    assert choose_compile(setting, device=device, batches=batches).line() == line


def adapted(family: str = "llama", **options: Any) -> tuple[Any, Callable[[], Tensor]]:
    model = zoo.adapted(zoo.make(family, attention="sdpa"), **options)
    upcast_trainable_params(model)
    plan = BatchPlan(zoo.rows_of([30, 41, 12]), packing=False, size=2, batches_per_step=1, seed=0)
    return model, lambda: LossFunction(model)(plan.make_batch([0, 1])).loss


def raise_in_backend(message: str) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError(message)

    return backend


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_compiled_layers_compute_the_same_loss_and_gradients(family: str):
    model, loss = adapted(family)
    model.train()
    choice = compile_layers(model.get_base_model(), loss, setting=True, backend="aot_eager")
    assert choice.on
    assert "2 decoder layers, compared with the plain ones" in choice.reason
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model.get_base_model()))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_cannot_be_compiled_stay_as_they_are_with_auto():
    model, loss = adapted()
    before = loss()
    backend = raise_in_backend("no C compiler\nmore")
    choice = compile_layers(model.get_base_model(), loss, setting="auto", backend=backend)
    assert not choice.on
    assert choice.line().startswith("compile: no (torch.compile failed: ")
    assert "\n" not in choice.reason
    assert torch.equal(loss(), before)


def test_layers_that_cannot_be_compiled_are_an_error_if_requested():
    model, loss = adapted()
    with pytest.raises(LoraError, match=r"performance\.compile: torch\.compile failed: ") as raised:
        compile_layers(model.get_base_model(), loss, setting=True, backend=raise_in_backend("no C compiler"))
    assert raised.value.hint == "write `performance: {compile: false}`"


def test_compiled_layers_that_compute_something_else_are_left_out():
    model, _ = adapted()
    trained = next(p for p in model.parameters() if p.requires_grad)
    calls = iter([1.0, 1.5])
    choice = compile_layers(
        model.get_base_model(), lambda: trained.sum() * next(calls), setting="auto", backend="eager"
    )
    assert choice.reason == "loss or gradient changed by 0.5"
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model.get_base_model()))
