"""Law: an adapter that was never trained changes nothing, to the last bit, where its method starts neutral."""

import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.model import fused_lora
from tests.model import zoo

IDS = torch.arange(3, 40)[None]
# They compute W + s·(BA - B₀A₀) from B = B₀, A = A₀ on: nothing but for the order in which a product is summed.
FROM_WEIGHTS = ["pissa", "olora", "corda"]
NEUTRAL = [name for name in zoo.LAYERED if name not in FROM_WEIGHTS]
WHOLE_LINEAR = ["loha", "lokr", "oft", "boft"]  # PEFT has them on nn.Linear, not on GPT-2's Conv1D


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", NEUTRAL)
def test_a_fresh_adapter_gives_the_base_logits(method: str, family: str):
    model = zoo.make(family)
    base = model(IDS).logits
    if family == "gpt2" and method in WHOLE_LINEAR:
        with pytest.raises(LoraError, match=r"adapter: PEFT refuses it: .*Conv1D") as refused:
            zoo.attached(model, method=method)
        assert "\n" not in refused.value.message
        return
    adapted = zoo.attached(model, method=method, seed=1)
    assert torch.equal(logits(adapted), base)
    fused_lora.fuse(adapted)
    # With gradients on, as in training: the fused layers are in use.
    assert logits(adapted).requires_grad
    assert zoo.relative(logits(adapted), base) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_one_that_starts_from_the_weights_gives_them_but_for_rounding(method: str, family: str):
    model = zoo.make(family)
    base = model(IDS).logits
    adapted = zoo.attached(model, method=method, seed=1)
    assert zoo.relative(logits(adapted), base) < 1e-5
    fused_lora.fuse(adapted)
    assert zoo.relative(logits(adapted), base) < 1e-5


@pytest.mark.parametrize("method", zoo.METHODS)
def test_a_trained_adapter_does_not(method: str):
    model = zoo.make("llama")
    base = model(IDS).logits
    assert zoo.relative(logits(zoo.adapted(model, method=method)), base) > 5e-3
