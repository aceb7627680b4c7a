"""The spectrum of a LoRA adapter's updates by kind of module: their size, and how much of the rank they use."""

from collections import defaultdict
from typing import Any

import torch

from lora_cli.merging import low_rank
from lora_cli.merging.expert_factors import stacked_name
from lora_cli.model.adapter_files import AdapterFiles

ENERGY_SHARES = (0.9, 0.95, 0.99)


def spectra_by_kind(files: AdapterFiles) -> list[dict[str, Any]]:
    """Return the spectra of a LoRA adapter as JSON, one record for each kind of module; untrained modules left out.

    A record has `kind`, `modules`, `rank` (`16`, or `8-16`), `norm` (‖ΔW‖, mean), `effective_rank` (mean),
    `energy_ranks` (mean rank by share of the energy), and `spectrum`: the median over the modules of each singular
    value, relative to the module's largest.

    Raises:
        LoraError: the adapter is not LoRA, or its file does not fit its configuration.
    """
    values_by_kind: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    for module, factors in low_rank.read_lora(files).factors.items():
        values = factors.svd()[1]
        if values.sum() > 0:
            values_by_kind[_kind(module)].append(values)
    return [_record(kind, group) for kind, group in values_by_kind.items()]


def _record(kind: str, group: list[torch.Tensor]) -> dict[str, Any]:
    ranks = [len(values) for values in group]
    common = torch.stack([values[: min(ranks)] / values[0] for values in group])
    energy_ranks = {
        f"{share:.2f}": sum(low_rank.rank_for_energy(values, share) for values in group) / len(group)
        for share in ENERGY_SHARES
    }
    return {
        "kind": kind,
        "modules": len(group),
        "rank": str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}",
        "norm": sum(float(values.square().sum().sqrt()) for values in group) / len(group),
        "effective_rank": sum(map(low_rank.effective_rank, group)) / len(group),
        "energy_ranks": energy_ranks,
        "spectrum": common.median(dim=0).values.tolist(),
    }


def _kind(module: str) -> str:
    """Return the last part of a module's name: `q_proj`, and for an expert its parameter: `experts.down_proj`."""
    if module.endswith(("]", ".weight")):  # of a parameter
        return ".".join(stacked_name(module).split(".")[-2:])
    return module.rpartition(".")[2]
