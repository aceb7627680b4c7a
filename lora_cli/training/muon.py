"""Muon for the matrices of a low-rank adapter, with AdamW for all other trained parameters, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Parts of the names of matrices of which a product is the update. The rows of embeddings, heads and rotations are not
# one matrix in this sense: Muon's authors train them with AdamW.
MATRIX_NAMES = (".lora_A.", ".lora_B.", ".hada_w", ".lokr_w")


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon over matrices and torch's AdamW over the rest; the groups of both are its groups."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.parts = parts
        self.param_groups = groups  # the same objects, so that a learning rate set here is used by the parts

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients of the parameters."""
        assert closure is None, "no caller has one"
        for part in self.parts:
            part.step()

    def part_of(self, parameter: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer that has `parameter`, with its state."""
        return next(o for o in self.parts if any(p is parameter for g in o.param_groups for p in g["params"]))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon trains the parameter of this name: a matrix of an update, with more than one row and column.

    An update of one row or column has one singular value: Muon would make every step of it equally long.
    """
    return parameter.ndim == 2 and min(parameter.shape) > 1 and any(part in name for part in MATRIX_NAMES)


def make_muon(groups: list[dict[str, Any]], **adamw_options: Any) -> MuonWithAdamW:
    """Create Muon (Jordan et al., kellerjordan.github.io/posts/muon) over the groups with `matrices`: True.

    Its steps are scaled to the size of AdamW's (Liu et al., arXiv:2502.16982, section 2.2), so that one learning rate
    fits both.

    Args:
        groups: parameter groups; the key `matrices` is removed from them.
        adamw_options: keyword arguments of AdamW for the other groups.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        (matrices if group.pop("matrices") else others).append(group)
    shared = {key: adamw_options[key] for key in ("lr", "weight_decay")}
    parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared)]
    if others:
        parts.append(torch.optim.AdamW(others, fused=True, **adamw_options))
    return MuonWithAdamW(parts)
