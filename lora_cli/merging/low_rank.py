"""Low-rank updates of a saved LoRA adapter as factors B and A: SVD, truncation, weighted sums. No base is needed.

ΔW = B·A, where both factors include the square root of the scale. The SVD of ΔW needs no product of the full size: the
QR decompositions B = Q₁R₁ and Aᵀ = Q₂R₂ give ΔW = Q₁(R₁R₂ᵀ)Q₂ᵀ, and only the middle [rank, rank] gets an SVD.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils.merge_utils import dare_linear, ties
from peft.utils.other import get_pattern_key
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.merging import expert_factors
from lora_cli.model.adapter_files import FACTOR_NAME, PREFIX, AdapterFiles, rank_of


class LowRankFactors(NamedTuple):
    """ΔW = b @ a of one module, fp64, scale included."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    is_embedding: bool  # PEFT uses other tensor names for the factors of embeddings

    @property
    def rank(self) -> int:
        """Number of columns of b."""
        return self.b.shape[1]

    @property
    def energy(self) -> float:
        """‖ΔW‖², the squared Frobenius norm."""
        return float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum().clamp_min(0))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [out, rank], the singular values [rank] in descending order, and Vᵀ [rank, in] of ΔW, fp64."""
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        return q_b @ u, s, vh @ q_a.T


class LoraWeights(NamedTuple):
    """A LoRA adapter read from disk."""

    files: AdapterFiles
    config: LoraConfig
    factors: dict[str, LowRankFactors]  # by the module's name in the base; `NAME[3]` for expert 3 of a stacked weight
    other_tensors: dict[str, Tensor]  # by PEFT's name: modules_to_save, biases, trained tokens, DoRA magnitudes
    wrappers: dict[str, str]  # PEFT's name of the layer over each adapted parameter (stacked experts), by full name

    @property
    def folder(self) -> Path:
        """Folder of the adapter."""
        return self.files.folder


def read_lora(adapter: AdapterFiles) -> LoraWeights:
    """Read the tensors of a LoRA adapter; its factors become fp64.

    Raises:
        LoraError: the adapter is not LoRA, or its file does not fit its configuration.
    """
    folder, config = adapter.folder, adapter.config
    if type(config) is not LoraConfig:
        raise LoraError(
            f"{folder} is {adapter.method}, which has no factors A and B",
            hint="use a LoRA adapter",
        )
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    other_tensors = {}
    for name, tensor in adapter.load().items():
        match = FACTOR_NAME.fullmatch(name)
        if match is None:
            other_tensors[name] = tensor
            continue
        tensors_by_module.setdefault(match["module"], {})[match["factor"]] = tensor.double()
        if match["embedding"]:
            embeddings.add(match["module"])
    factors: dict[str, LowRankFactors] = {}
    wrappers = {}
    targets = sorted(config.target_parameters or ())
    for wrapper, tensors in sorted(tensors_by_module.items(), key=lambda each: _natural_sort_key(each[0])):
        a, b = tensors["A"], tensors["B"]
        if a.dim() != 2 or b.dim() != 2:
            raise LoraError(
                f"{folder}: {wrapper} is a convolution, whose factors are not matrices", hint="merge it with lora merge"
            )
        parameter = expert_factors.parameter_of(wrapper, tensors_by_module, targets) if targets else None
        if parameter is None:
            module = wrapper.replace(expert_factors.WRAPPED, "")
            scale = _scale(config, module, len(a))
            factors[module] = _scaled(a, b, scale, is_embedding=wrapper in embeddings)
            bias = f"{PREFIX}{wrapper}.lora_B.bias"  # lora_bias: true; it is scaled as BA is
            if bias in other_tensors:
                other_tensors[bias] = (other_tensors[bias].double() * scale).float()
            continue
        rank = rank_of(config, parameter)
        if len(a) % rank or len(a) != b.shape[1]:
            raise LoraError(
                f"{folder}: {parameter} has factors of {len(a)} rows, which rank {rank} does not divide",
                hint="adapter_config.json and adapter_model.safetensors do not belong together",
            )
        wrappers[parameter] = wrapper
        scaled = _scaled(a, b, _scale(config, parameter, rank), is_embedding=False)
        pairs = expert_factors.unstack(scaled.a, scaled.b, rank)
        for expert, (own_a, own_b) in enumerate(pairs):
            name = expert_factors.expert_name(parameter, expert) if len(pairs) > 1 else parameter
            factors[name] = LowRankFactors(own_a, own_b, is_embedding=False)
    for module, each in factors.items():
        if not math.isfinite(each.energy):
            raise LoraError(f"{folder}: the update of {module} is too large to compute with", hint="train it again")
    return LoraWeights(adapter, config, factors, other_tensors, wrappers)


def _natural_sort_key(module: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts layer 2 before layer 10, unlike the order of names in the file."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _scaled(a: Tensor, b: Tensor, scale: float, *, is_embedding: bool) -> LowRankFactors:
    """Return the factors [rank, in] and [out, rank] fp64, each times the root of the scale; b has the sign."""
    root = abs(scale) ** 0.5
    return LowRankFactors(a * root, b * (-root if scale < 0 else root), is_embedding)


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    """Return the factor alpha/r of a module, or alpha/√r for rsLoRA."""
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def rank_for_energy(values: Tensor, share: float) -> int:
    """Return how many of the singular `values` [rank] are needed for `share` of the energy; at least one."""
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
    return min(len(values), 1 + int((shares < share - 1e-12).sum()))


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of the singular `values` [rank]: exp of the entropy of their energy shares.

    It is r for r equal values, and near 1 if one value dominates. Roy and Vetterli, The effective rank (EUSIPCO 2007),
    here with energies (squares) in place of singular values.
    """
    shares = values.square() / values.square().sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def truncate_rank(factors: LowRankFactors, rank: int) -> LowRankFactors:
    """Return the best approximation of rank `rank` or less, from the largest singular values (Eckart, Young, 1936)."""
    u, s, vh = factors.svd()
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return LowRankFactors(root[:, None] * vh[:kept], u[:, :kept] * root, factors.is_embedding)


def energy_kept(original: Mapping[str, LowRankFactors], reduced: Mapping[str, LowRankFactors]) -> dict[str, float]:
    """Return for each module the share of the energy that is left in `reduced`: 1 - ‖ΔW - ΔW'‖²/‖ΔW‖²."""
    shares = {}
    for module, before in original.items():
        after = reduced[module]
        difference = LowRankFactors(
            torch.cat([before.a, after.a]), torch.cat([before.b, -after.b], dim=1), before.is_embedding
        )
        shares[module] = 1 - difference.energy / before.energy if before.energy else 1.0
    return shares


def concatenate_factors(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> dict[str, LowRankFactors]:
    """Return the exact weighted sum of the updates, with the sum of their ranks.

    An adapter without a module counts as a zero update of that module.
    """
    combined: dict[str, LowRankFactors] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, factors in adapter.factors.items():
            before = combined.get(module)
            a, b = factors.a, factors.b * weight
            combined[module] = factors._replace(
                a=torch.cat([before.a, a]) if before else a, b=torch.cat([before.b, b], dim=1) if before else b
            )
    return combined


def average_factors(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> dict[str, LowRankFactors]:
    """Sum A and B separately, each times the root of the weight, as PEFT's `linear`: same rank, only approximate.

    Raises:
        LoraError: the adapters differ in their modules or ranks, or a weight is negative.
    """
    first = adapters[0]
    for adapter in adapters[1:]:
        if {m: f.rank for m, f in adapter.factors.items()} != {m: f.rank for m, f in first.factors.items()}:
            raise LoraError(
                f"--method linear: {adapter.folder} has other modules or ranks than {first.folder}",
                hint="write --method svd, which sums the full updates",
            )
    if min(weights) < 0:
        raise LoraError("--method linear: negative weights are not supported", hint="write --method svd or concat")
    combined = {}
    for module, first_factors in first.factors.items():
        roots = [weight**0.5 for weight in weights]
        summands = [adapter.factors[module] for adapter in adapters]
        a = torch.stack([root * summand.a for root, summand in zip(roots, summands, strict=True)]).sum(dim=0)
        b = torch.stack([root * summand.b for root, summand in zip(roots, summands, strict=True)]).sum(dim=0)
        combined[module] = LowRankFactors(a, b, first_factors.is_embedding)
    return combined


def combine_dense(
    adapters: Sequence[LoraWeights], weights: Sequence[float], *, method: str, density: float, seed: int
) -> dict[str, Tensor]:
    """Combine the full updates of the adapters with PEFT's TIES or DARE.

    Args:
        adapters: over the same base.
        weights: of the adapters.
        method: "ties" keeps the largest entries, then those whose sign has the majority (Yadav et al.,
            arXiv:2306.01708); "dare" keeps random entries and scales them up (Yu et al., arXiv:2311.03099).
        density: share of the entries of each update to keep.
        seed: of the random entries.

    Returns:
        ΔW [out, in] fp64 of each module.
    """
    torch.manual_seed(seed)
    combined = {}
    for module in {module: None for adapter in adapters for module in adapter.factors}:
        example = next(adapter.factors[module] for adapter in adapters if module in adapter.factors)
        updates = [
            (adapter.factors[module].b @ adapter.factors[module].a).float()
            if module in adapter.factors
            else torch.zeros(example.b.shape[0], example.a.shape[1])
            for adapter in adapters
        ]
        scales = torch.tensor(list(weights))
        merged: Tensor = ties(updates, scales, density) if method == "ties" else dare_linear(updates, scales, density)
        combined[module] = merged.double()
    return combined


def factorize(updates: Mapping[str, Tensor], rank: int, embeddings: Mapping[str, bool]) -> dict[str, LowRankFactors]:
    """Return the best approximations of rank `rank` of full updates.

    Args:
        updates: ΔW [out, in] fp64, by module.
        rank: of the results.
        embeddings: whether each module is an embedding.
    """
    factors = {}
    for module, update in updates.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        root = s[:rank].sqrt()
        factors[module] = LowRankFactors(root[:, None] * vh[:rank], u[:, :rank] * root, embeddings[module])
    return factors


def lora_config_for(
    factors: Mapping[str, LowRankFactors], like: LoraConfig, *, parameters: Collection[str] = ()
) -> LoraConfig:
    """Return a LoraConfig for these factors, based on `like`; alpha equals the rank, so that the scale is 1.

    `parameters` are the full names of adapted parameters; all other names are modules.
    """
    groups = expert_factors.group_experts(factors)
    ranks = {name: max(factors[each].rank for each in group) for name, group in groups.items()}
    max_rank = max(ranks.values())
    lower_ranks = {name: rank for name, rank in ranks.items() if rank != max_rank}
    config: LoraConfig = LoraConfig.from_peft_type(**like.to_dict())
    config.r = config.lora_alpha = max_rank
    config.use_rslora = False
    config.rank_pattern, config.alpha_pattern = dict(lower_ranks), dict(lower_ranks)
    config.target_modules = sorted(groups.keys() - set(parameters))
    config.target_parameters = sorted(groups.keys() & set(parameters)) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True
    return config


def to_peft_tensors(
    factors: Mapping[str, LowRankFactors], wrappers: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the factors as tensors of a PEFT adapter file, fp32, by PEFT's names.

    These are A [rank, in] and B [out, rank] of a module, and A [experts·rank, in] and B [out, rank·experts] of the
    stacked weight of experts. `wrappers` are PEFT's names of the layers over adapted parameters, by full name.
    """
    tensors = {}
    for name, group in expert_factors.group_experts(factors).items():
        first = factors[group[0]]
        if len(group) > 1:
            a, b = expert_factors.stack([(factors[each].a, factors[each].b) for each in group])
        else:
            a, b = first.a, first.b
        for letter, factor in (("A", a), ("B", b)):
            last = f"lora_embedding_{letter}" if first.is_embedding else f"lora_{letter}.weight"
            tensors[f"{PREFIX}{(wrappers or {}).get(name, name)}.{last}"] = factor.float().contiguous()
    return tensors
