"""Factors of adapters on stacked expert weights: one pair A, B for each expert, from and to PEFT's stacked tensors.

PEFT stores the factors of all experts of a weight in two matrices, A [experts·rank, in] and B [out, rank·experts].
Their name says how deeply PEFT's layers over the weights of one module are nested, and not which weight it is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# PEFT nests in the order in which the module registers its parameters; transformers registers these in this order.
REGISTERED_FIRST = ("gate_up_proj", "up_proj")
WRAPPED = ".base_layer"


def parameter_of(module: str, modules: Iterable[str], targets: Sequence[str]) -> str | None:
    """Return the full name of the parameter that PEFT's layer `module` adapts; None if it adapts a module.

    Args:
        module: as in the adapter file, such as `model.layers.0.mlp.experts.base_layer`.
        modules: all modules of the adapter file.
        targets: `target_parameters` of the adapter, as full names or their last parts.
    """
    owner = module.replace(WRAPPED, "")
    parents = [owner, *(owner.split(".", n)[n] for n in range(1, owner.count(".") + 1))]
    leaves = {t.rpartition(".")[2] for t in targets if t.rpartition(".")[0] in ("", *parents)}
    # A target of one name alone, such as `gate_up_proj`, may also be in a module that it does not mean.
    nested = sorted((m for m in modules if m.replace(WRAPPED, "") == owner), key=len, reverse=True)
    if len(leaves) != len(nested) or not leaves:
        return None
    order = sorted(leaves, key=lambda leaf: (leaf not in REGISTERED_FIRST, leaf))
    return f"{owner}.{order[nested.index(module)]}"


def expert_name(parameter: str, expert: int) -> str:
    """Return the name of one expert's factors: `model.layers.0.mlp.experts.gate_up_proj[3]`."""
    return f"{parameter}[{expert}]"


def stacked_name(name: str) -> str:
    """Return the full name of the parameter or module that a name of factors belongs to."""
    return re.sub(r"\[\d+\]$", "", name)


def unstack(a: Tensor, b: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Return A [rank, in] and B [out, rank] of each expert, from A [experts·rank, in] and B [out, rank·experts]."""
    experts = len(a) // rank
    b_of = b.reshape(len(b), rank, experts)
    return [(each, b_of[:, :, number]) for number, each in enumerate(a.reshape(experts, rank, -1))]


def stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B from those of each expert, with zeros up to the largest rank among them."""
    rank = max(len(a) for a, _ in pairs)
    padded_a = torch.stack([torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
    padded_b = torch.stack([torch.nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs], dim=2)
    return padded_a.flatten(0, 1), padded_b.flatten(1)


def group_experts(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Return the names of factors by the parameter or module that they belong to, experts in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stacked_name(name), []).append(name)
    for group in groups.values():
        group.sort(key=lambda name: int(name.rpartition("[")[2].rstrip("]")) if name.endswith("]") else 0)
    return groups
