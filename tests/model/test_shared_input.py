"""Layers with the same input run as one step, with the outputs and gradients of layers that run one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lora_cli.model import fused_lora
from lora_cli.model.fused_lora import SHARED, FusedLoraFunction
from lora_cli.model.shared_input import layers_with_one_input, share_inputs
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import zoo
from tests.model.families import FAMILIES, config_of
from tests.model.zoo import gradients
from tests.support import checkpoints

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_by_one(model: PeftModel) -> PeftModel:
    """Return a copy of `model` whose layers do not know of each other."""
    copied = deepcopy(model)
    for module in copied.modules():
        module.__dict__.pop(SHARED, None)
    return copied


def groups(model: nn.Module) -> int:
    return len({id(vars(module)[SHARED]) for module in model.modules() if SHARED in vars(module)})


@contextmanager
def steps() -> Iterator[list[int]]:
    """Record the number of layers of each fused step."""
    counts: list[int] = []
    apply = FusedLoraFunction.apply

    def counted(x: Tensor, products: tuple[Any, ...], *factors: Any) -> Any:
        counts.append(len(products))
        return apply(x, products, *factors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_lora.FusedLoraFunction, "apply", counted)
        yield counts


def assert_same(model: PeftModel, dtype: torch.dtype, **options: bool) -> None:
    expected = gradients(one_by_one(model), **options)
    for mine, theirs in zip(gradients(model, **options), expected, strict=True):
        assert zoo.relative(mine.double(), theirs.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("spec", [{}, {"dropout": 0.3}, {"freeze_a": True}], ids=["plain", "dropout", "frozen A"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "granite", "cohere"])
def test_one_step_has_the_gradients_of_three(family: str, spec: dict[str, Any], recomputed: bool):
    model = zoo.adapted(zoo.make(family).double(), **spec).train()
    assert groups(model) >= 2
    assert_same(model, torch.float64, recomputed=recomputed)


@pytest.mark.parametrize("family", ["opt", "gpt-j", "phi", "qwen3-moe", "gpt-oss"])
def test_other_families_have_the_same_gradients(family: str):
    model = zoo.adapted(AutoModelForCausalLM.from_config(config_of(FAMILIES[family]))).train()
    assert groups(model) >= 2
    assert_same(model, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_layers_have_the_same_gradients(dtype: torch.dtype, tmp_path: Path):
    zoo.make("qwen2", dtype=dtype).save_pretrained(tmp_path)
    spec = QuantizationSpec.model_validate({"compute_dtype": str(dtype).removeprefix("torch.")})
    model = zoo.adapted(checkpoints.load(tmp_path, dtype=dtype, quantization=spec), dropout=0.2).train()
    assert groups(model) == 4
    assert_same(model, dtype)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [3, 1, 3, 1]),
        (["q_proj", "v_proj"], [2, 2]),
        (["q_proj"], [1, 1]),
        (["k_proj", "o_proj"], [1] * 4),
    ],
)
def test_layers_with_an_adapter_are_one_step(targets: Any, expected: list[int]):
    model = zoo.adapted(zoo.make("llama"), target_modules=targets).train()
    with steps() as counts:  # without those of the MLP, which is a step of its own
        gradients(model)
    assert counts == expected
    assert_same(model, torch.float32)


def attention(model: nn.Module) -> Any:
    return next(module for module in model.modules() if type(module) is LlamaAttention)


def test_a_layer_with_a_hook_runs_alone():
    model = zoo.adapted(zoo.make("llama", num_hidden_layers=1), target_modules=["q_proj", "k_proj", "v_proj"]).train()
    seen: list[Tensor] = []
    attention(model).k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with steps() as counts:
        gradients(model)
    assert counts == [2, 1]
    assert len(seen) == 1
    assert_same(model, torch.float32)


def test_no_output_and_no_input_is_kept_after_a_pass():
    model = zoo.adapted(zoo.make("llama")).train()
    gradients(model)
    for module in model.modules():
        if SHARED in vars(module):
            assert vars(module)[SHARED]._x is None
            assert vars(module)[SHARED]._waiting == {}


def test_an_interrupted_pass_leaves_nothing_that_the_next_one_uses():
    model = zoo.adapted(zoo.make("llama"), target_modules=["q_proj", "k_proj", "v_proj"]).train()
    expected = gradients(one_by_one(model))
    handle = attention(model).q_proj.register_forward_hook(lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        gradients(model)
    handle.remove()
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert zoo.relative(mine, theirs) < 1e-5


def test_without_gradients_and_with_another_adapter_layers_run_pefts_forward():
    model = zoo.adapted(zoo.make("llama")).eval()
    ids = torch.arange(3, 20)[None]
    with steps() as counts, torch.no_grad():
        model(input_ids=ids)
    assert counts == []
    with steps() as counts, model.disable_adapter():
        model(input_ids=ids)
    assert counts == []


def test_a_copy_of_the_model_has_groups_of_its_own():
    model = zoo.adapted(zoo.make("llama"))
    copied = deepcopy(model)
    mine, other = vars(attention(model).q_proj)[SHARED], vars(attention(copied).q_proj)[SHARED]
    assert mine is not other
    assert other._layers[1] is attention(copied).k_proj


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            setattr(self, name, nn.Linear(3, 3))


def forward_with(body: str) -> tuple[tuple[str, ...], ...]:
    """Return what is read from a forward function with these lines."""
    scope: dict[str, Any] = {}
    source = "def forward(self, x, y=None):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    exec(source, scope)
    forward = scope["forward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cli.model.shared_input.inspect.getsource", lambda _: source)
        return layers_with_one_input.__wrapped__(forward)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = self.a(x)\nb = self.b(x)\nreturn a + b", (("a", "b"),)),
        ("a, b = self.a(x).view(3), self.b(x)\nreturn self.c(a) + b", (("a", "b"),)),
        ("return self.c(self.act(self.a(x)) * self.b(x))", (("a", "b"),)),
        ("a, b = self.a(x), self.b(x)\nc, d = self.c(y), self.d(y)\nreturn a + b + c + d", (("a", "b"), ("c", "d"))),
        ("a = self.a(x)\nb = self.b(y)\nreturn a + b", ()),  # cross attention
        ("x = x * 2\na = self.a(x)\nreturn a + self.b(x)", ()),  # assigned
        ("a = self.a(x)\nx += 1\nreturn a + self.b(x)", ()),
        ("a = self.a(x)\nif y is None:\n    a = a + self.b(x)\nreturn a", ()),  # conditional
        ("a = self.a(x)\nb = a if y is None else self.b(x)\nreturn a + b", ()),
        ("a = self.a(x)\nb = y is None and self.b(x)\nreturn a", ()),
        ("a = self.a(x)\nfor _ in range(2):\n    a = a + self.b(x)\nreturn a", ()),
        ("a = self.a(x)\nreturn self.b(x) + self.b(x) + a", ()),  # twice
        ("a = self.a(x, y)\nreturn a + self.b(x)", ()),
        ("a = self.a(x)\nreturn [self.b(x) for _ in range(2)]", ()),
    ],
)
def test_the_layers_with_one_input_are_read_from_the_code(body: str, expected: tuple[tuple[str, ...], ...]):
    assert forward_with(body) == expected


def test_code_without_a_file_is_left_alone():
    scope: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", scope)
    assert layers_with_one_input(scope["forward"]) == ()
    assert share_inputs(Attention()) == 0
