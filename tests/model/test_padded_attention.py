"""Attention for rows padded on the right gives the logits of torch's own, and is used only where that one is."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lora_cli.errors import LoraError
from lora_cli.model.loss import LossFunction
from lora_cli.model.padded_attention import PADDED_ATTENTION
from lora_cli.model.select_attention import choose_attention
from tests.model import families, zoo
from tests.model.test_families import plan_of


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3", "llama4", "qwen3.5", "bert", "bert-tokens", "llama-classifier", "t5", "bart"]
)
def test_logits_are_those_of_torchs_attention(name: str, tmp_path: Path):
    family = families.FAMILIES[name]
    model = families.load(family, families.write(family, tmp_path)).model.eval()
    (batch,) = plan_of(family, packing=False).all_batches()
    logits = []
    for attention in ("sdpa", PADDED_ATTENTION):
        choose_attention(model, attention, packing=False, causal=family.task == "causal-lm")
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            logits.append(LossFunction(model, task=family.task).logits(batch))
    assert zoo.relative(logits[1], logits[0]) < 1e-5


class OfAnotherPackage(LlamaForCausalLM):
    """Its code may make masks that transformers does not know."""


def test_it_is_left_out_where_it_may_compute_something_else():
    # gemma2 caps its scores, which torch's attention does not.
    for model in (zoo.make("gemma2"), OfAnotherPackage(zoo.make("llama").config)):
        with pytest.raises(LoraError, match="no implementation works"):
            choose_attention(model, PADDED_ATTENTION, packing=False)
