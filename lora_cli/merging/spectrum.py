"""The spectra of a LoRA adapter's updates, by module and by kind of module: their size, and how much rank they use."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from lora_cli.merging import low_rank
from lora_cli.merging.expert_factors import stacked_name
from lora_cli.merging.low_rank import LowRankFactors
from lora_cli.model.adapter_files import AdapterFiles

ENERGY_SHARES = (0.9, 0.95, 0.99)


class ModuleStats(NamedTuple):
    """Statistics of one adapted module; the field names are the keys of the JSON output."""

    module: str
    rank: int
    parameters: int
    norm: float  # of ΔW, Frobenius
    base_norm: float | None  # of W, Frobenius; None if the base is not available
    effective_rank: float
    ranks: dict[str, int]  # by share of the energy: the rank that keeps it
    singular_values: list[float]

    @property
    def relative(self) -> float | None:
        """‖ΔW‖/‖W‖."""
        return self.norm / self.base_norm if self.base_norm else None


class KindStats(NamedTuple):
    """Statistics of the modules of one kind; the field names are the keys of the JSON output."""

    kind: str  # `q_proj`
    modules: int
    rank: str  # `16`, or `8-16`
    norm: float  # of ΔW, mean
    effective_rank: float  # mean
    energy_ranks: dict[str, float]  # by share of the energy: the mean rank that keeps it
    spectrum: list[float]  # the median over the modules of each singular value, relative to the module's largest


def module_stats(module: str, factors: LowRankFactors, base_norm: float | None = None) -> ModuleStats:
    """Return the statistics of the update B·A of a module."""
    _, values, _ = factors.svd()
    return ModuleStats(
        module,
        factors.rank,
        factors.a.numel() + factors.b.numel(),
        float(values.square().sum().sqrt()),
        base_norm,
        low_rank.effective_rank(values),
        {f"{share:.2f}": low_rank.rank_for_energy(values, share) for share in ENERGY_SHARES},
        values.tolist(),
    )


def by_kind(stats: Iterable[ModuleStats]) -> dict[str, list[ModuleStats]]:
    """Return the modules of each kind."""
    kinds: defaultdict[str, list[ModuleStats]] = defaultdict(list)
    for module in stats:
        kinds[_kind(module.module)].append(module)
    return kinds


def kind_stats(kind: str, group: Sequence[ModuleStats]) -> KindStats:
    """Return the statistics of the modules `group` of a kind, none of whose updates is zero."""
    common_rank = min(module.rank for module in group)
    values = torch.tensor([module.singular_values[:common_rank] for module in group])
    count = len(group)
    return KindStats(
        kind,
        count,
        rank_range([module.rank for module in group]),
        sum(module.norm for module in group) / count,
        sum(module.effective_rank for module in group) / count,
        {share: sum(module.ranks[share] for module in group) / count for share in group[0].ranks},
        (values / values[:, :1]).median(dim=0).values.tolist(),
    )


def rank_range(ranks: Sequence[int]) -> str:
    """Return `16`, or `8-16`."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def spectra_by_kind(files: AdapterFiles) -> list[dict[str, Any]]:
    """Return the spectra of a LoRA adapter as JSON, a `KindStats` for each kind of module; untrained modules left out.

    Raises:
        LoraError: the adapter is not LoRA, or its file does not fit its configuration.
    """
    stats = (module_stats(module, factors) for module, factors in low_rank.read_lora(files).factors.items())
    trained = [module for module in stats if module.norm > 0]
    return [kind_stats(kind, group)._asdict() for kind, group in by_kind(trained).items()]


def _kind(module: str) -> str:
    """Return the last part of a module's name: `q_proj`, and for an expert its parameter: `experts.down_proj`."""
    if module.endswith(("]", ".weight")):  # of a parameter
        return ".".join(stacked_name(module).split(".")[-2:])
    return module.rpartition(".")[2]
