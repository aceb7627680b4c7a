"""Law: an adapter that was never trained changes nothing, to the last bit."""

import pytest
import torch

from lora_cli.model import adapter, fused
from lora_cli.recipe.schema import AdapterSpec
from tests.model import zoo

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", adapter.METHODS)
def test_a_fresh_adapter_gives_the_base_logits(method: str, family: str):
    model = zoo.make(family)
    base = model(IDS).logits
    spec = AdapterSpec.model_validate({"method": method, "rank": 4, "dropout": 0.0})
    adapted = adapter.attach(model, spec, seed=1)
    assert torch.equal(adapted(IDS).logits, base)
    fused.fuse(adapted)
    # With gradients on, as in training: the fused layers are in use.
    assert adapted(IDS).logits.requires_grad
    assert zoo.relative(adapted(IDS).logits, base) == 0


@pytest.mark.parametrize("method", adapter.METHODS)
def test_a_trained_adapter_does_not(method: str):
    model = zoo.make("llama")
    base = model(IDS).logits
    assert zoo.relative(zoo.adapted(model, method=method)(IDS).logits, base) > 1e-2
