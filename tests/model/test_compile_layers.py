"""Decoder layers are compiled where it pays, and compute what they computed; what cannot be compiled is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.evaluation.answers import Prompt, generate_answers
from lora_cli.model.compile_layers import choose_compile, compile_layers, decoder_layers
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.schema import GenerationSpec
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Forget the graphs of other tests: there is a limit for each function."""
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("setting", "device", "batches", "dropout", "line"),
    [
        ("auto", CPU, 9999, False, "compile: no (on a CPU it takes minutes to start, and gains little)"),
        ("auto", GPU, 999, False, "compile: no (pays from 1,000 batches on; this run has 999)"),
        ("auto", GPU, 1000, False, "compile: each decoder layer (the run has 1,000 batches)"),
        (
            "auto",
            GPU,
            9999,
            True,
            "compile: no (adapter.dropout draws a seed in each layer, which parts the compiled graphs)",
        ),
        (False, GPU, 9999, False, "compile: no (performance.compile)"),
        (True, CPU, 1, True, "compile: each decoder layer (performance.compile)"),
    ],
)
def test_the_choice_and_its_reason(setting: Any, device: torch.device, batches: int, dropout: bool, line: str):
    assert choose_compile(setting, device=device, batches=batches, dropout=dropout).line() == line


def adapted(family: str = "llama", **options: Any) -> tuple[Any, Callable[[], Tensor]]:
    model = zoo.adapted(zoo.make(family, attention="sdpa"), **options)
    upcast_trainable_params(model)
    plan = BatchPlan(zoo.rows_of([30, 41, 12]), packing=False, size=2, batches_per_step=1, seed=0)
    return model, lambda: LossFunction(model)(plan.make_batch([0, 1])).loss


def raise_in_backend(message: str) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError(message)

    return backend


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
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


@pytest.mark.parametrize(("factors", "told"), [([1.0, 1.5], "0.5"), ([1.0, float("nan")], "nan")])
def test_compiled_layers_that_compute_something_else_are_left_out(factors: list[float], told: str):
    model, _ = adapted()
    trained = next(p for p in model.parameters() if p.requires_grad)
    calls = iter(factors)

    def loss() -> Tensor:  # right in value, wrong in its gradient
        value = trained.sum()
        return value.detach() + (value - value.detach()) * next(calls)

    choice = compile_layers(model.get_base_model(), loss, setting="auto", backend="eager")
    assert choice.reason == f"loss or gradient changed by {told}"
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model.get_base_model()))


def test_a_model_without_known_layers_is_told():
    model = torch.nn.Linear(2, 2)
    model.dtype = torch.float32  # type: ignore[assignment]
    choice = compile_layers(model, lambda: model(torch.ones(1, 2)).sum(), setting="auto", backend="eager")
    assert choice.line() == "compile: no (this architecture has no decoder layers that are known)"


def test_answers_are_generated_without_compiling(monkeypatch: pytest.MonkeyPatch):
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    model = zoo.adapted(zoo.make("llama", attention="sdpa", vocab_size=len(tokenizer)))
    for layer in decoder_layers(model.get_base_model()):
        layer.compile(backend=backend, dynamic=True)
    prompts = [Prompt("rows:1", [3, 4, 5], "Hi", ["Ho"], 1, [[3]])]
    answers = generate_answers(model, tokenizer, prompts, spec=GenerationSpec(max_new_tokens=4), seed=0)
    assert len(answers) == 1
    assert not compiled
    model(torch.tensor([[3, 4, 5]]))
    assert compiled
