"""Replace parts of PEFT's layers that have the host wait for the GPU in every layer and pass.

BOFT asks whether a matrix was singular, and the dropouts of LoHa, LoKr and BOFT are drawn on the CPU.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.boft.layer import BOFTLayer, MultiplicativeDropoutLayer
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from torch import Tensor, nn


def remove_waits(model: nn.Module) -> None:
    """Replace these parts in the layers of all adapters of `model`."""
    for module in model.modules():
        if isinstance(module, BOFTLayer):
            module.__dict__["cayley_batch"] = rotations
        elif isinstance(module, LoHaLayer | LoKrLayer):
            module.__dict__["get_delta_weight"] = partial(_delta_weight, module)
        elif isinstance(module, MultiplicativeDropoutLayer):
            module.__dict__["forward"] = partial(_drop_blocks, module)


def rotations(data: Tensor) -> Tensor:
    """Return the rotations (I + S)⁻¹(I - S) of the skew-symmetric parts S of `data` [n, r, r], in its dtype.

    I + S has an inverse, whatever S is. It is computed in fp32.
    """
    skew = 0.5 * (data - data.mT)
    identity = torch.eye(data.shape[-1], device=data.device)
    solved: Tensor = torch.linalg.solve_ex(identity + skew, identity - skew, left=False).result
    return solved.to(data.dtype)


def _delta_weight(layer: Any, name: str, *, apply_rank_dropout: bool = False) -> Tensor:
    """Return the update of a LoHa or LoKr layer, [out, in]; in training some of its rows are dropped."""
    weight: Tensor = type(layer).get_delta_weight(layer, name)
    if not apply_rank_dropout:
        return weight
    kept = (torch.rand(len(weight), device=weight.device) > layer.rank_dropout[name]).to(weight.dtype)
    if isinstance(layer, LoHaLayer) or layer.rank_dropout_scale[name]:
        kept = kept / kept.mean()
    dropped: Tensor = weight * kept.view(-1, *(1,) * (weight.ndim - 1))
    return dropped


def _drop_blocks(layer: Any, x: Tensor) -> Tensor:
    """Return `x` [factors, blocks, r, r], with the identity in some blocks of one factor in training."""
    if not layer.training:
        return x
    factors, blocks, size, _ = x.shape
    dropped = torch.rand(blocks, device=x.device).argsort() < int(layer.p * blocks)
    of_factor = torch.arange(factors, device=x.device) == torch.randint(factors, ()).item()  # drawn on the CPU
    replaced = of_factor[:, None, None, None] & dropped[:, None, None]
    return torch.where(replaced, torch.eye(size, device=x.device, dtype=x.dtype), x)
