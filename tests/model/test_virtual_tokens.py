"""The forward with virtual tokens is PEFT's, to the bit."""

from pathlib import Path

import pytest
import torch

from lora_cli.model import virtual_tokens
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.loss import LossFunction
from tests.model import families, zoo
from tests.model.test_families import plan_of


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "bert-tokens", "llama-classifier", "t5"])
def test_outputs_are_those_of_peft(name: str, method: str, tmp_path: Path):
    family = families.FAMILIES[name]
    if family.kind == "bert":  # which has no option for fewer key heads, but PEFT reads it
        family = family._replace(options={"num_key_value_heads": 4})
    loaded = families.load(family, families.write(family, tmp_path))
    loaded.model.set_attn_implementation("eager")
    context = AdapterContext(task=family.task, heads=loaded.heads)
    model = zoo.attached(loaded.model, method=method, virtual_tokens=3, context=context).eval()
    (batch,) = plan_of(family, packing=False).all_batches()
    inputs = LossFunction(model, task=family.task).inputs(batch)
    if name == "bert":
        inputs["token_type_ids"] = batch.attention_mask.long()
    with torch.no_grad():
        before, found = (run(model, inputs).logits for run in (lambda m, i: m(**i), virtual_tokens.forward))
    assert torch.equal(found, before)
