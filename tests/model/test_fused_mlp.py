"""The fused MLP equals the module's own forward over PEFT's layers, output and gradients, and keeps less memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_cli.model import fused_mlp
from lora_cli.model.fused_mlp import KIND, fuse_mlps, values_kept
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import zoo
from tests.model.families import FAMILIES as OTHER_FAMILIES
from tests.model.families import config_of
from tests.support import checkpoints

FAMILIES = {"llama": 2, "qwen2": 2, "gemma2": 2, "phi3": 2, "gpt-neox": 2, "granite": 2, "deepseek3": 2}
OTHERS = ("gpt2", "bloom", "mamba")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def mlps(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if KIND in module.__dict__]


def results(forward: Callable[[Tensor], Tensor], mlp: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of x and of every trained parameter, after the same random numbers."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = forward(x)
    trained = [p for p in mlp.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *trained))]


def assert_equals_own(mlp: Any, dtype: torch.dtype, shape: tuple[int, ...] = (2, 5)) -> None:
    """Compare the fused step with the module's own forward, whose layers are fused one by one and equal PEFT's."""
    generator = torch.Generator().manual_seed(1)
    kind, own = mlp.__dict__[KIND]
    width = getattr(mlp, kind.wide[0]).in_features
    x, weights = (torch.randn((*shape, width), generator=generator).to(dtype) for _ in range(2))
    expected = results(lambda x: own(mlp, x), mlp, x, weights)
    mine = results(mlp, mlp, x, weights)
    assert calls(mlp, x) == 1
    for a, b in zip(mine, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert zoo.relative(a.double(), b.double()) < TOLERANCE[dtype]


def calls(mlp: Any, x: Tensor) -> int:
    """Return how often a forward pass of `mlp` runs as one step."""
    count = 0

    def counted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return apply(*args)

    apply = fused_mlp.FusedMlpFunction.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_mlp.FusedMlpFunction, "apply", counted)
        mlp(x)
    return count


@pytest.mark.parametrize("spec", [{}, {"dropout": 0.3}, {"freeze_a": True}], ids=["plain", "dropout", "frozen A"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_mlp_equals_the_modules_own_forward(family: str, dtype: torch.dtype, spec: dict[str, Any]):
    model = zoo.adapted(zoo.make(family, dtype=dtype), **spec).train()
    assert len(mlps(model)) == FAMILIES[family]
    for mlp in mlps(model):
        assert_equals_own(mlp, dtype)


def other_family(name: str, **spec: Any) -> Any:
    return zoo.adapted(AutoModelForCausalLM.from_config(config_of(OTHER_FAMILIES[name])), **spec).train()


@pytest.mark.parametrize("family", ["falcon", "phi"])
def test_families_with_one_wide_layer_are_fused(family: str):
    model = other_family(family, dropout=0.1)
    assert len(mlps(model)) == 2
    for mlp in mlps(model):
        assert_equals_own(mlp, torch.float32)


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"], ["up_proj", "k_proj"]],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_each_layer_may_be_without_an_adapter(targets: list[str], quantized: bool, tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path)
    spec = QuantizationSpec(compute_dtype="float32") if quantized else None
    model = zoo.adapted(checkpoints.load(tmp_path, quantization=spec), target_modules=targets, dropout=0.2)
    for mlp in mlps(model.train()):
        assert_equals_own(mlp, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_mlp_equals_its_own_forward(dtype: torch.dtype, tmp_path: Path):
    zoo.make("qwen2", dtype=dtype).save_pretrained(tmp_path)
    spec = QuantizationSpec.model_validate({"compute_dtype": str(dtype).removeprefix("torch.")})
    model = zoo.adapted(checkpoints.load(tmp_path, dtype=dtype, quantization=spec), dropout=0.2).train()
    for mlp in mlps(model):
        assert_equals_own(mlp, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4)])
def test_any_number_of_tokens_is_computed(shape: tuple[int, ...]):
    assert_equals_own(mlps(zoo.adapted(zoo.make("llama")))[0], torch.float32, shape)


def test_no_tokens_give_no_output_and_gradients_of_zero():
    mlp = mlps(zoo.adapted(zoo.make("llama")))[0]
    x = torch.empty(3, 0, 64, requires_grad=True)
    y = mlp(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (3, 0, 64)
    assert not any(p.grad.any() for p in mlp.parameters() if p.requires_grad)


def test_an_input_without_a_gradient_gets_none():
    mlp = mlps(zoo.adapted(zoo.make("llama")))[0]
    own = mlp.__dict__[KIND][1]
    x, trained = torch.randn(5, 64), [p for p in mlp.parameters() if p.requires_grad]
    mine, expected = (torch.autograd.grad(forward(x).square().sum(), trained) for forward in (mlp, partial(own, mlp)))
    for a, b in zip(mine, expected, strict=True):
        assert zoo.relative(a, b) < 1e-6


def test_the_output_can_be_changed_in_place_as_falcon_does():
    mlp = mlps(zoo.adapted(zoo.make("llama")))[0]
    y = mlp(torch.randn(2, 5, 64))
    y += 1.0
    y.sum().backward()


@contextmanager
def saved_bytes(*, without: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes that autograd keeps, by storage, the parameters of a module left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in without.parameters()}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize(
    ("family", "targets", "mine", "own"),
    [
        ("llama", "all-linear", 2, 4),  # gate and up; and the activation, and its product with up
        ("llama", ["q_proj"], 2, 3),
        ("gpt-neox", "all-linear", 1, 2),
        ("phi3", "all-linear", 2, 4),
    ],
)
def test_tensors_of_the_intermediate_size_that_are_kept(family: str, targets: Any, mine: int, own: int):
    mlp = mlps(zoo.adapted(zoo.make(family), target_modules=targets, rank=1))[0]
    kind, forward = mlp.__dict__[KIND]
    tokens, x = 1000, torch.randn(1000, 64, requires_grad=True)
    wide, inputs = tokens * getattr(mlp, kind.last).in_features * 4, x.nbytes
    for run, expected in ((mlp, mine), (partial(forward, mlp), own)):
        with saved_bytes(without=mlp) as kept:
            run(x)
        rest = sum(kept.values()) - expected * wide
        assert 0 <= rest <= inputs + 4 * 4 * tokens + 100  # x and the products of rank 1


REPLACED = {
    "no gradients": lambda model: torch.no_grad(),
    "adapter disabled": lambda model: model.disable_adapter(),
    "a hook": lambda model: hooked(mlps(model)[0].up_proj),
}


@contextmanager
def hooked(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


@pytest.mark.parametrize("case", REPLACED)
def test_where_a_layer_does_more_than_multiply_the_modules_own_forward_runs(case: str):
    model, x = zoo.adapted(zoo.make("llama")), torch.randn(3, 64)
    mlp = mlps(model)[0]
    assert calls(mlp, x) == 1
    with REPLACED[case](model):
        assert calls(mlp, x) == 0
        assert torch.equal(mlp(x), mlp.__dict__[KIND][1](mlp, x))


@pytest.mark.parametrize("spec", [{"method": "dora"}, {"bias": "all"}, {"method": "ia3"}])
def test_other_methods_run_the_modules_own_forward(spec: dict[str, Any]):
    model = zoo.adapted(zoo.make("llama", mlp_bias=True), **spec)
    assert sum(calls(mlp, torch.randn(3, 64)) for mlp in mlps(model)) == 0


@pytest.mark.parametrize("family", OTHERS)
def test_other_mlps_are_left_alone(family: str):
    assert fuse_mlps(zoo.make(family)) == 0


class ScaledMlp(LlamaMLP):
    """An MLP with the attributes of another one that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)
        return down_proj  # noqa: RET504  as transformers writes it


class RenamedMlp(LlamaMLP):
    """The same code with other names."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output."""
        output = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output  # noqa: RET504  as transformers writes it


@pytest.mark.parametrize(("kind", "count"), [(LlamaMLP, 1), (RenamedMlp, 1), (ScaledMlp, 0)])
def test_the_form_is_read_from_the_code(kind: type[nn.Module], count: int):
    config = zoo.make("llama").config
    assert fuse_mlps(nn.Sequential(kind(config))) == count


def test_an_activation_whose_derivative_is_not_known_is_left_alone():
    assert fuse_mlps(zoo.make("llama", hidden_act="relu2")) == 0
    assert fuse_mlps(zoo.make("llama", hidden_act="relu")) == 2


def test_a_copy_of_the_model_computes_with_its_own_layers():
    model, x = zoo.adapted(zoo.make("llama")), torch.randn(3, 64)
    copied = deepcopy(model)
    for mlp in mlps(model):
        mlp.down_proj.base_layer.weight.data.zero_()
        mlp.down_proj.lora_B["default"].weight.data.zero_()
    assert not mlps(model)[0](x).any()
    assert mlps(copied)[0](x).any()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_dropout_of_a_model_with_fused_mlps_draws_what_it_drew(recomputed: bool, monkeypatch: pytest.MonkeyPatch):
    def gradients() -> list[Tensor]:
        return zoo.gradients(zoo.adapted(zoo.make("llama"), dropout=0.3).train(), recomputed=recomputed)

    fused = gradients()
    monkeypatch.setattr(fused_mlp, "KINDS", ())
    for mine, theirs in zip(fused, gradients(), strict=True):
        assert zoo.relative(mine, theirs) < 1e-5


class TypedWeight(nn.Parameter):
    """Stands for the weights of a quantization library, which are tensors of their own type."""


def test_a_layer_with_weights_of_another_type_runs_its_own_forward():
    model, x = zoo.adapted(zoo.make("llama"), target_modules=["q_proj"]), torch.randn(3, 64)
    mlp = mlps(model)[0]
    assert calls(mlp, x) == 1
    mlp.up_proj.weight = TypedWeight(mlp.up_proj.weight.detach(), requires_grad=False)
    assert calls(mlp, x) == 0


def test_a_layer_or_an_activation_that_was_changed_runs_its_own_forward():
    model, x = zoo.adapted(zoo.make("llama")), torch.randn(3, 64)
    mlp, other = mlps(model)
    own = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: own(x) * 3
    assert calls(mlp, x) == 0
    other.act_fn.register_forward_hook(lambda module, args, output: output * 2)
    assert calls(other, x) == 0


@pytest.mark.parametrize(
    ("family", "spec", "expected"),
    [
        ("llama", {}, 2),
        ("gpt-neox", {}, 1),
        ("phi3", {}, 2),
        ("llama", {"method": "dora"}, None),
        ("llama", {"method": "dora", "target_modules": ["q_proj"]}, 2),  # its MLPs are plain
        ("gpt2", {}, None),
    ],
)
def test_the_values_that_an_mlp_keeps_are_told_to_the_memory_estimate(
    family: str, spec: dict[str, Any], expected: int | None
):
    model = zoo.adapted(zoo.make(family), **spec)
    assert {values_kept(mlp) for mlp in mlps(model)} == ({expected} if mlps(model) else set())
    assert values_kept(model) is None  # not an MLP
