"""Fused LoRA = PEFT's layer on the device, and several layers as one step = one by one, with the same dropout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

from lora_cli.model import fused_lora
from lora_cli.model.fused_lora import SHARED, FusedLora, FusedLora4bit, is_fusable
from lora_cli.model.fused_mlp import KIND
from lora_cli.model.lora_product import SeededMask
from tests.gpu.tiny_runs import adapt, load_base
from tests.model import zoo

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative to the largest value
TOKENS = 37


class FixedDropout(nn.Module):
    """Dropout that zeroes given values, in place of random ones."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept, self.p = kept, p

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] with zeros where it is dropped, scaled by 1/(1 - p)."""
        return x * self.kept.to(x.dtype) / (1 - self.p)


def kept_values(dropped: Tensor | SeededMask, x: Tensor) -> Tensor:
    """Return bool in the shape of x from what `draw_dropped` returned: a mask, or on the CPU the positions."""
    if isinstance(dropped, SeededMask):
        return ~dropped.draw(x.reshape(-1, x.shape[-1])).view(x.shape)
    kept = torch.ones(x.numel(), dtype=torch.bool)
    kept[dropped] = False
    return kept.view(x.shape)


def output_and_gradients(forward: Any, layer: Any, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the output of `forward`, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    y = forward(x)
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *factors))]


def assert_equals_peft(layer: Any, peft_class: type, dtype: torch.dtype, device: torch.device, p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, TOKENS, layer.in_features), generator=generator).to(device, dtype)
    weights = torch.randn((1, TOKENS, layer.out_features), generator=generator).to(device, dtype)
    drawn: list[Tensor | SeededMask] = []
    draw = fused_lora.draw_dropped
    layer.train()
    vars(layer).pop(SHARED, None)  # this layer alone
    assert is_fusable(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_lora, "draw_dropped", lambda *args: drawn.append(draw(*args)) or drawn[-1])
        found = output_and_gradients(layer, layer, x, weights)
    assert len(drawn) == (p > 0)
    if drawn:
        layer.lora_dropout["default"] = FixedDropout(kept_values(drawn[0], x), p)
    expected = output_and_gradients(lambda value: peft_class.forward(layer, value), layer, x, weights)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert zoo.relative(mine.double(), theirs.double()) < TOLERANCE[dtype]


def layers(model: PeftModel, kind: type) -> list[Any]:
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_the_fused_layer_is_pefts_over_a_plain_layer(family: str, p: float, dtype: torch.dtype, device: torch.device):
    model = zoo.adapted(zoo.make(family, dtype=dtype), dropout=p).to(device)
    found = layers(model, FusedLora)
    assert len(found) == 14
    for layer in found[:7]:
        assert_equals_peft(layer, LoraLinear, dtype, device, p)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("double", [True, False])
def test_the_fused_layer_is_pefts_over_an_nf4_layer(
    tmp_path: Path, double: bool, p: float, dtype: torch.dtype, device: torch.device
):
    zoo.make("qwen2", dtype=dtype).save_pretrained(tmp_path)
    compute = str(dtype).removeprefix("torch.")
    model = adapt(load_base(tmp_path, device, dtype=dtype, compute_dtype=compute, double_quant=double), dropout=p)
    found = layers(model, FusedLora4bit)
    assert len(found) == 14
    for layer in found[:7]:
        assert_equals_peft(layer, LoraLinear4bit, dtype, device, p)


def gradients(model: PeftModel, device: torch.device) -> list[Tensor]:
    """Return the loss, and the gradients of all factors, after the same random numbers."""
    ids = torch.randint(3, zoo.VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(2)).to(device)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_several_layers_as_one_step_have_the_gradients_of_one_by_one(
    tmp_path: Path, p: float, nf4: bool, device: torch.device
):
    zoo.make("llama").save_pretrained(tmp_path)
    options = {"compute_dtype": "float32"} if nf4 else {}
    model = adapt(load_base(tmp_path, device, dtype=torch.float32, **options), dropout=p).train()
    found = gradients(model, device)
    count = 0
    for module in model.modules():
        if KIND in vars(module):
            del module.forward
            count += 1
        vars(module).pop(SHARED, None)
    assert count == 2
    for mine, theirs in zip(found, gradients(model, device), strict=True):
        assert mine.device.type == device.type
        assert zoo.relative(mine.double(), theirs.double()) < TOLERANCE[torch.float32]
