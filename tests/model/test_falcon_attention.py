"""Falcon through the attention interface computes what its own code computes; its rows can be packed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lora_cli.data.batches import BatchPlan
from lora_cli.model import select_attention
from lora_cli.model.falcon_attention import FalconInterfaceAttention, use_attention_interface
from lora_cli.model.loss import LossFunction
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.varlen_attention import VARLEN_ATTENTION
from tests.model import zoo
from tests.model.families import FAMILIES, config_of
from tests.support.eager_varlen import use_eager_varlen

pytestmark = pytest.mark.slow
KINDS = {
    "7b": FAMILIES["falcon"],  # one key head
    "40b": FAMILIES["falcon-40b"],  # a key head for each group of query heads
    "mha": FAMILIES["falcon"]._replace(options={"multi_query": False, "ffn_hidden_size": 128}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(KINDS[kind]), attn_implementation="sdpa").eval()


@each_kind
@torch.no_grad()
def test_logits_are_those_of_its_own_code_with_padding_and_with_a_cache(kind: str):
    model, ids = make(kind), torch.randint(3, zoo.VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    own, answer = model(**inputs).logits, model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    use_attention_interface(model)
    layers = [module for module in model.modules() if isinstance(module, FalconInterfaceAttention)]
    assert len(layers) == model.config.num_hidden_layers
    assert zoo.relative(model(**inputs).logits[mask.bool()], own[mask.bool()]) < 1e-5
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False), answer)
    model.set_attn_implementation("eager")
    assert zoo.relative(model(**inputs).logits[mask.bool()], own[mask.bool()]) < 1e-5


@each_kind
@pytest.mark.parametrize("attention", [PACKED_ATTENTION, VARLEN_ATTENTION])
@pytest.mark.parametrize("every", [None, 1], ids=["kept", "recomputed"])
def test_packed_rows_are_separate_rows(kind: str, attention: str, every: int | None, monkeypatch: pytest.MonkeyPatch):
    use_eager_varlen(monkeypatch)
    rows = zoo.rows_of([30, 41, 12])
    reference = zoo.adapted(make(kind), target_modules=["query_key_value", "dense"])
    expected, _ = zoo.loss_row_by_row(reference, rows)
    expected.backward()
    model = make(kind)
    check = select_attention.choose_attention(model, attention, packing=True)
    assert check is not None
    assert check.leak == 0
    adapted = zoo.adapted(model, target_modules=["query_key_value", "dense"])
    if every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        model.enable_input_require_grads()
        adapted.train()
        for module in adapted.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    plan = BatchPlan(rows, packing=True, size=96, batches_per_step=1, seed=0)
    loss = LossFunction(adapted)(plan.make_batch([0, 1, 2])).loss
    loss.backward()
    assert abs(float(loss) / float(expected) - 1) < 1e-5
    pairs = zip(adapted.named_parameters(), reference.named_parameters(), strict=True)
    differences = [zoo.relative(a.grad, b.grad) for (_, a), (_, b) in pairs if a.grad is not None]
    assert differences
    assert max(differences) < 1e-4


def test_one_key_head_does_not_reach_torch_beside_many_query_heads(monkeypatch: pytest.MonkeyPatch):
    """torch's fast kernels on a GPU take no broadcast: it would compute all scores."""
    shapes: list[tuple[int, int]] = []
    own = functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shapes.append((query.shape[1], key.shape[1]))
        assert options.get("enable_gqa") or query.shape[1] == key.shape[1]
        return own(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    model = make("7b")
    use_attention_interface(model)
    model(torch.randint(3, zoo.VOCABULARY, (2, 12)))
    assert shapes


def test_with_alibi_it_keeps_its_own_attention():
    model = AutoModelForCausalLM.from_config(config_of(FAMILIES["falcon-alibi"]))
    use_attention_interface(model)
    assert not any(isinstance(module, FalconInterfaceAttention) for module in model.modules())
