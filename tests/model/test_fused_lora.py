"""The fused LoRA layer equals PEFT's, output and gradients; where it might not, PEFT's forward runs."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.model import fused_lora
from lora_cli.model.fused_lora import (
    FusedLayer,
    FusedLora,
    FusedLora4bit,
    is_fusable,
    multiply_fused,
    register_custom_layers,
)
from lora_cli.model.lora_product import Factors, LoraProduct, SeededMask, draw_dropout_positions, draw_dropped
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import families, zoo
from tests.model.families import config_of
from tests.support import checkpoints

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def layers(model: PeftModel) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def output_and_gradients(forward, layer: Any, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the output of `forward`, and the gradients of x and of the trained A and B."""
    x = x.clone().requires_grad_()
    y = forward(x)
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *(f for f in factors if f.requires_grad)))]


def assert_equals_peft(layer: Any, peft_class: type, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((*shape, layer.in_features), generator=generator).to(dtype)
    weights = torch.randn((*shape, layer.out_features), generator=generator).to(dtype)
    assert is_fusable(layer)
    expected = output_and_gradients(partial(peft_class.forward, layer), layer, x, weights)
    for mine, theirs in zip(output_and_gradients(layer, layer, x, weights), expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert zoo.relative(mine.double(), theirs.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_fused_layer_equals_pefts_layer(dtype: torch.dtype, shape: tuple[int, ...], method: str, family: str):
    model = zoo.adapted(zoo.make(family, dtype=dtype), method=method)
    assert {type(layer) for layer in layers(model)} == {FusedLora}
    assert_equals_peft(layers(model)[0], LoraLinear, shape, dtype)


@pytest.mark.parametrize("family", ["falcon", "falcon-40b"])  # whose linear layers are a class of their own
def test_falcons_layers_are_fused(family: str):
    model = zoo.adapted(AutoModelForCausalLM.from_config(config_of(families.FAMILIES[family])))
    assert {type(layer) for layer in layers(model)} == {FusedLora}
    for layer in layers(model)[:4]:
        assert_equals_peft(layer, LoraLinear, (2, 5), torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_4_bit_layer_equals_pefts_layer(tmp_path: Path, dtype: torch.dtype, code: str, frozen: bool):
    zoo.make("qwen2", dtype=dtype).save_pretrained(tmp_path)
    spec = QuantizationSpec.model_validate({"type": code, "compute_dtype": str(dtype).removeprefix("torch.")})
    model = zoo.adapted(checkpoints.load(tmp_path, dtype=dtype, quantization=spec), freeze_a=frozen)
    fused = [module for module in model.modules() if type(module) is FusedLora4bit]
    assert len(fused) == 14
    for layer in fused[:7]:
        assert_equals_peft(layer, LoraLinear4bit, (2, 5), dtype)


def test_a_4_bit_layer_of_another_compute_dtype_runs_pefts_forward(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path)
    spec = QuantizationSpec(compute_dtype="bfloat16")
    model = zoo.adapted(checkpoints.load(tmp_path, quantization=spec))
    layer = next(module for module in model.modules() if type(module) is FusedLora4bit)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.equal(layer(x), LoraLinear4bit.forward(layer, x))


@pytest.mark.parametrize("device", ["cpu", "another"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_equals_pefts_formula_at_the_same_positions(p: float, transposed: bool, device: str):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = (draw(6, 9).T if transposed else draw(9, 6)).detach()
    w, bias, a, b = draw(5, 6), draw(5), draw(3, 6), draw(5, 3)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.manual_seed(3)
    dropped = draw_dropout_positions(x.numel(), p)
    kept = torch.ones(x.numel(), dtype=torch.float64)
    kept[dropped] = 0
    if device == "another":  # which gets a mask
        dropped = SeededMask(4, p)
        kept = (~dropped.draw(x)).double()
    weights = draw(9, 5)
    expected = x @ w.T + bias + 2.0 * ((x * kept.view(9, 6) / (1 - p)) @ a.T) @ b.T
    product = LoraProduct(lambda: w, bias, 2.0 / (1 - p), dropped)
    (output,) = multiply_fused(x, [FusedLayer(product, Factors(a, b))])
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((output * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_is_active_in_training_only_and_follows_the_seed():
    model = zoo.adapted(zoo.make("llama"), dropout=0.5)
    layer, x = layers(model)[0], torch.randn(40, 64, generator=torch.Generator().manual_seed(0))

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x).detach()

    layer.eval()
    without_dropout = output(0)
    assert torch.equal(output(1), without_dropout)
    layer.train()
    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    # Unbiased: the mean output of 600 draws equals the output without dropout, within the standard error.
    draws = torch.stack([output(seed) for seed in range(600)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - without_dropout).abs() < 5.5 * error + 1e-6).all()


@settings(deadline=None)
@given(count=st.integers(1, 20_000), p=st.floats(1e-6, 0.99), seed=st.integers(0, 2**32 - 1))
def test_dropped_positions_are_ascending_unique_and_in_range(count: int, p: float, seed: int):
    torch.manual_seed(seed)
    positions = draw_dropout_positions(count, p)
    assert positions.dtype == torch.int64
    assert (positions.diff() > 0).all()
    if len(positions):
        assert int(positions[0]) >= 0
        assert int(positions[-1]) < count


@pytest.mark.parametrize("p", [1e-4, 0.01, 0.05, 0.3, 0.5, 0.9])
def test_each_position_is_dropped_independently_with_probability_p(p: float):
    torch.manual_seed(7)
    count, rounds = 10_000, 200
    hit = torch.zeros(rounds, count, dtype=torch.bool)
    for line in hit:
        line[draw_dropout_positions(count, p)] = True

    def within(share: float, expected: float, trials: int) -> bool:
        return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)

    drawn = hit.float()
    assert within(float(drawn.mean()), p, rounds * count)
    for edge in (slice(0, 50), slice(-50, None)):  # the first and last positions are as likely as any
        assert within(float(drawn[:, edge].mean()), p, rounds * 50)
    for step in (1, 2, 64):  # neighbors are independent
        together = (drawn[:, :-step] * drawn[:, step:]).mean()
        assert within(float(together), p * p, rounds * (count - step) // 2)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", {"method": "dora"}),
        ("gpt2", {}),  # Conv1D
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    ],
)
def test_other_layers_are_not_fused(family: str, spec: dict[str, object]):
    model = zoo.adapted(zoo.make(family), **spec)
    assert layers(model)
    assert not zoo.fused_layers(model)


def test_another_device_gets_a_mask_without_a_value_that_the_host_waits_for():
    x = torch.empty(4, 5, 6, device="meta")
    torch.manual_seed(0)
    first, second = draw_dropped(x, 0.1), draw_dropped(x, 0.1)
    assert isinstance(first, SeededMask)
    assert first != second
    torch.manual_seed(0)
    assert draw_dropped(x, 0.1) == first


def test_a_mask_is_the_same_wherever_it_is_drawn_and_drops_its_share():
    x = torch.empty(300, 400)
    mask = SeededMask(5, 0.1).draw(x)
    assert (mask.dtype, mask.shape) == (torch.bool, x.shape)
    assert torch.equal(SeededMask(5, 0.1).draw(x), mask)
    assert not torch.equal(SeededMask(6, 0.1).draw(x), mask)
    assert abs(float(mask.float().mean()) - 0.1) < 5 * math.sqrt(0.09 / x.numel())


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_model_with_masks_from_seeds_has_the_gradients_of_one_that_keeps_them(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
):
    def gradients(draw: Any) -> list[Tensor]:
        monkeypatch.setattr(fused_lora, "draw_dropped", draw)
        return zoo.gradients(zoo.adapted(zoo.make("llama"), dropout=0.3).train(), recomputed=recomputed)

    def positions_of_mask(x: Tensor, p: float) -> Tensor:
        return seeded(x, p).draw(x.reshape(-1, x.shape[-1])).flatten().nonzero().flatten()

    def seeded(x: Tensor, p: float) -> SeededMask:
        return SeededMask(int(torch.randint(1 << 62, ())), p)

    for mine, theirs in zip(gradients(seeded), gradients(positions_of_mask), strict=True):
        assert torch.equal(mine, theirs)


def test_only_a_single_active_adapter_is_fused():
    model = zoo.adapted(zoo.make("llama"))
    count = len(zoo.fused_layers(model))
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert not zoo.fused_layers(model)
    model.set_adapter("second")
    assert len(zoo.fused_layers(model)) == count == 14


def test_a_target_parameter_of_a_linear_layer_gets_pefts_own_layer():
    model = zoo.make("llama")
    config = LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], lora_dropout=0.0)
    register_custom_layers(config)
    adapted = get_peft_model(model, config)
    assert {type(m).__name__ for m in adapted.modules() if isinstance(m, LoraLayer)} == {"ParamWrapper"}


def test_disabled_merged_and_unmerged_adapters_give_pefts_logits():
    model = zoo.adapted(zoo.make("llama"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        trained = model(ids).logits
    base = zoo.make("llama")(ids).logits
    assert zoo.relative(model(ids).logits.detach(), trained) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    model.merge_adapter()
    assert zoo.relative(model(ids).logits.detach(), trained) < 1e-5
    model.unmerge_adapter()
    assert zoo.relative(model(ids).logits.detach(), trained) < 1e-5
