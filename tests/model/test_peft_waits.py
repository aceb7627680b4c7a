"""What replaces parts of PEFT's layers computes the same without dropout, and drops what PEFT drops."""

from typing import Any

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer, MultiplicativeDropoutLayer
from torch import Tensor

from lora_cli.model import peft_waits
from tests.model import zoo


def layer_of(method: str, dropout: float) -> Any:
    model = zoo.adapted(zoo.make("llama"), method=method, dropout=dropout).train()
    return model.get_base_model().model.layers[0].self_attn.q_proj


def test_rotations_are_those_of_peft():
    data = torch.randn(5, 4, 4)
    found = peft_waits.rotations(data)
    assert torch.equal(found, BOFTLayer.cayley_batch(None, data))
    torch.testing.assert_close(found @ found.mT, torch.eye(4).expand(5, 4, 4))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_rows_of_the_update_are_dropped(method: str):
    layer = layer_of(method, 0.5)
    whole = type(layer).get_delta_weight(layer, "default")
    assert torch.equal(layer.get_delta_weight("default"), whole)
    drawn = [layer.get_delta_weight("default", apply_rank_dropout=True) for _ in range(2)]
    kept = [each.any(dim=1) for each in drawn]
    assert not torch.equal(*kept)
    assert all(16 < each.sum() < 48 for each in kept)  # of 64 rows
    # LoHa multiplies the others by the inverse of their share, as PEFT does; LoKr does not.
    factor = 64 / kept[0].sum() if method == "loha" else 1
    torch.testing.assert_close(drawn[0], whole * kept[0][:, None] * factor)


def test_blocks_of_one_factor_are_replaced_by_the_identity():
    own, theirs = (MultiplicativeDropoutLayer(0.4).train() for _ in range(2))
    peft_waits.remove_waits(own)
    blocks = torch.randn(3, 10, 4, 4)

    def replaced(layer: MultiplicativeDropoutLayer) -> Tensor:
        out = layer(blocks)
        changed = (out != blocks).any(dim=(2, 3))
        assert torch.equal(out[changed], torch.eye(4).expand(int(changed.sum()), 4, 4))
        return changed.sum(dim=1).sort().values

    for layer in (own, theirs):
        assert all(replaced(layer).tolist() == [0, 0, 4] for _ in range(5))
    assert len({tuple((own(blocks) != blocks).any(dim=(2, 3)).flatten().tolist()) for _ in range(5)}) > 1
    assert torch.equal(own.eval()(blocks), blocks)
