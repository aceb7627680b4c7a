"""AdaLoRA's ranks are those that PEFT allocates."""

import torch

from lora_cli.model.adalora import AdaLoraRankAllocator
from tests.model import zoo


def test_components_are_kept_as_peft_keeps_them():
    own, theirs = (zoo.adapted(zoo.make("llama"), method="adalora") for _ in range(2))
    allocator = AdaLoraRankAllocator(own)
    ids = torch.arange(3, 33)[None]
    patterns = []
    for step in range(1, 11):
        for model in (own, theirs):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p -= 0.1 * p.grad
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        pairs = zip(own.parameters(), theirs.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step
        patterns.append(own.peft_config["default"].rank_pattern)
        assert patterns[-1] == theirs.peft_config["default"].rank_pattern
    kept = [None if pattern is None else sum(map(sum, pattern.values())) for pattern in patterns]
    layers = 14
    assert kept[0] is None
    assert kept[1] > kept[4] == kept[-1] == 2 * layers
