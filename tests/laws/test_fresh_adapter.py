"""Law: an untrained adapter does not change the logits at all if its method starts with a zero update."""

import pytest
import torch

from lora_cli.errors import LoraError
from tests.model import zoo

IDS = torch.arange(3, 40)[None]
# They compute W + s·(BA - B₀A₀), starting with B = B₀ and A = A₀: zero except for rounding.
FROM_WEIGHTS = ["pissa", "olora", "corda"]
ZERO_UPDATE = [name for name in zoo.LAYERED if name not in FROM_WEIGHTS]
LINEAR_ONLY = ["loha", "lokr", "oft", "boft"]  # PEFT supports them on nn.Linear, not on GPT-2's Conv1D


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", ZERO_UPDATE)
def test_a_fresh_adapter_gives_the_base_logits(method: str, family: str):
    model = zoo.make(family)
    base = model(IDS).logits
    if family == "gpt2" and method in LINEAR_ONLY:
        with pytest.raises(LoraError, match=r"adapter: PEFT rejects it: .*Conv1D") as refused:
            zoo.attached(model, method=method)
        assert "\n" not in refused.value.message
        return
    adapted = zoo.attached(model, method=method, seed=1)
    with torch.no_grad():  # PEFT's own forward
        assert torch.equal(logits(adapted), base)
    # Gradients are on, as in training, so the fused layers are used.
    assert logits(adapted).requires_grad
    assert zoo.relative(logits(adapted), base) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_a_fresh_adapter_initialized_from_the_weights_gives_the_base_logits_up_to_rounding(method: str, family: str):
    model = zoo.make(family)
    base = model(IDS).logits
    adapted = zoo.attached(model, method=method, seed=1)
    with torch.no_grad():  # PEFT's own forward
        assert zoo.relative(logits(adapted), base) < 1e-5
    assert zoo.relative(logits(adapted), base) < 1e-5


@pytest.mark.parametrize("method", zoo.METHODS)
def test_a_trained_adapter_changes_the_logits(method: str):
    model = zoo.make("llama")
    base = model(IDS).logits
    assert zoo.relative(logits(zoo.adapted(model, method=method)), base) > 5e-3
