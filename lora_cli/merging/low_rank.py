"""The low-rank updates of a saved adapter as pairs of factors: looked into, cut down, put together. No base is needed.

ΔW = B·A with the root of the scale in either. Its singular values come from two small decompositions: B = Q₁R₁ and
Aᵀ = Q₂R₂ give ΔW = Q₁(R₁R₂ᵀ)Q₂ᵀ, of which only the [rank, rank] middle is decomposed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.merge_utils import dare_linear, ties
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.load_adapter import PREFIX
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS

FACTOR_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$"
)


class LowRankFactors(NamedTuple):
    """ΔW = b @ a of one module, fp64, scale included."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    embedding: bool  # PEFT names the factors of embeddings otherwise

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]

    @property
    def energy(self) -> float:
        """‖ΔW‖², the sum of all squares."""
        return float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum().clamp_min(0))

    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, rank], singular values [rank] from the largest, and Vᵀ [rank, in]."""
        left, first = torch.linalg.qr(self.b)
        right, second = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(first @ second.T)
        return left @ u, s, vh @ right.T


class LoraWeights(NamedTuple):
    """A LoRA adapter as it is on disk."""

    folder: Path
    config: LoraConfig
    pairs: dict[str, LowRankFactors]  # by the module's name in the base
    others: dict[str, Tensor]  # by PEFT's name: modules trained whole, biases, single tokens, magnitudes


def read_lora(folder: Path) -> LoraWeights:
    """The adapter in `folder`.

    Raises:
        LoraError: it is no LoRA, or one over the stacked weights of experts.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise LoraError(
            f"{folder} is {str(config.peft_type.value).lower()}, which has no factors A and B",
            hint="give a LoRA adapter",
        )
    if config.target_parameters:
        raise LoraError(
            f"{folder} adapts stacked weights of experts ({config.target_parameters[0]}), a product for each expert",
            hint="give an adapter of linear layers and embeddings",
        )
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    others = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        match = FACTOR_NAME.fullmatch(name.replace(".base_layer.", "."))
        if match is None:
            others[name] = tensor
            continue
        found.setdefault(match["module"], {})[match["factor"]] = tensor.double()
        if match["embedding"]:
            embeddings.add(match["module"])
    pairs = {}
    for module, factors in sorted(found.items(), key=lambda each: _natural_order(each[0])):
        a, b = factors["A"], factors["B"]
        root = _scale(config, module, len(a)) ** 0.5
        pairs[module] = LowRankFactors(a * root, b * root, module in embeddings)
    return LoraWeights(folder, config, pairs, others)


def _natural_order(module: str) -> list[tuple[bool, int, str]]:
    """Layer 2 comes before layer 10, which the file has the other way round."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in module.split(".")]


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def rank_for_energy(values: Tensor, share: float) -> int:
    """How many of the singular `values` hold `share` of the energy; at least one."""
    held = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
    return min(len(values), 1 + int((held < share - 1e-12).sum()))


def effective_rank(values: Tensor) -> float:
    """e to the entropy of the energies' shares: r where r components weigh the same, near 1 where one outweighs all.

    Roy and Vetterli, The effective rank (EUSIPCO 2007), with energies in place of singular values.
    """
    shares = values.square() / values.square().sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def truncate_rank(pair: LowRankFactors, rank: int) -> LowRankFactors:
    """The nearest update of no more than `rank`, by its largest components (Eckart and Young, 1936)."""
    u, s, vh = pair.singular()
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return LowRankFactors(root[:, None] * vh[:kept], u[:, :kept] * root, pair.embedding)


def energy_kept(whole: Mapping[str, LowRankFactors], part: Mapping[str, LowRankFactors]) -> dict[str, float]:
    """For each module, the share of the energy of `whole` that `part` does not miss: 1 - ‖ΔW - ΔW'‖²/‖ΔW‖²."""
    found = {}
    for module, pair in whole.items():
        other = part[module]
        missed = LowRankFactors(
            torch.cat([pair.a, other.a]), torch.cat([pair.b, -other.b], dim=1), pair.embedding
        ).energy
        found[module] = 1 - missed / pair.energy if pair.energy else 1.0
    return found


def concatenate_factors(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> dict[str, LowRankFactors]:
    """The weighted sum of the updates, exactly: ranks add up. A module that an adapter has not counts as zero there."""
    summed: dict[str, LowRankFactors] = {}
    for saved, weight in zip(adapters, weights, strict=True):
        for module, pair in saved.pairs.items():
            before = summed.get(module)
            a, b = pair.a, pair.b * weight
            summed[module] = pair._replace(
                a=torch.cat([before.a, a]) if before else a, b=torch.cat([before.b, b], dim=1) if before else b
            )
    return summed


def average_factors(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> dict[str, LowRankFactors]:
    """The factors weighted and summed each by itself, as PEFT's `linear` has it: the rank stays, the sum is rough.

    Raises:
        LoraError: the adapters are not of one rank on the same modules.
    """
    first = adapters[0]
    for saved in adapters[1:]:
        if {m: p.rank for m, p in saved.pairs.items()} != {m: p.rank for m, p in first.pairs.items()}:
            raise LoraError(
                f"--method linear: {saved.folder} has other modules or ranks than {first.folder}",
                hint="write --method svd, which sums the updates themselves",
            )
    if min(weights) < 0:
        raise LoraError("--method linear: takes no negative weight", hint="write --method svd or concat")
    found = {}
    for module, pair in first.pairs.items():
        roots = [weight**0.5 for weight in weights]
        parts = [saved.pairs[module] for saved in adapters]
        a = torch.stack([root * part.a for root, part in zip(roots, parts, strict=True)]).sum(dim=0)
        b = torch.stack([root * part.b for root, part in zip(roots, parts, strict=True)]).sum(dim=0)
        found[module] = LowRankFactors(a, b, pair.embedding)
    return found


def combine_dense(
    adapters: Sequence[LoraWeights], weights: Sequence[float], *, method: str, density: float, seed: int
) -> dict[str, Tensor]:
    """Whole updates [out, in] by PEFT's `ties` (Yadav et al., arXiv:2306.01708: the largest entries, those of the sign
    that most of them have) or `dare` (Yu et al., arXiv:2311.03099: entries drawn at random, the others scaled up).
    """
    torch.manual_seed(seed)
    found = {}
    for module in {module: None for saved in adapters for module in saved.pairs}:
        shape = next(saved.pairs[module] for saved in adapters if module in saved.pairs)
        dense = [
            (saved.pairs[module].b @ saved.pairs[module].a).float()
            if module in saved.pairs
            else torch.zeros(shape.b.shape[0], shape.a.shape[1])
            for saved in adapters
        ]
        scales = torch.tensor(list(weights))
        merged: Tensor = ties(dense, scales, density) if method == "ties" else dare_linear(dense, scales, density)
        found[module] = merged.double()
    return found


def factorize(dense: Mapping[str, Tensor], rank: int, embeddings: Mapping[str, bool]) -> dict[str, LowRankFactors]:
    """The nearest updates of `rank`, of whole ones."""
    found = {}
    for module, update in dense.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        root = s[:rank].sqrt()
        found[module] = LowRankFactors(root[:, None] * vh[:rank], u[:, :rank] * root, embeddings[module])
    return found


def lora_config_for(pairs: Mapping[str, LowRankFactors], like: LoraConfig) -> LoraConfig:
    """PEFT's configuration of an adapter with these factors: alpha is the rank, so that the scale is 1."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    most = max(ranks.values())
    apart = {module: rank for module, rank in ranks.items() if rank != most}
    config: LoraConfig = LoraConfig.from_peft_type(**like.to_dict())
    config.r = config.lora_alpha = most
    config.use_rslora = False
    config.rank_pattern, config.alpha_pattern = dict(apart), dict(apart)
    config.target_modules = sorted(pairs)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True
    return config


def to_peft_tensors(pairs: Mapping[str, LowRankFactors]) -> dict[str, Tensor]:
    """The factors by PEFT's names, fp32."""
    found = {}
    for module, pair in pairs.items():
        for letter, factor in (("A", pair.a), ("B", pair.b)):
            name = f"lora_embedding_{letter}" if pair.embedding else f"lora_{letter}.weight"
            found[f"{PREFIX}{module}.{name}"] = factor.float().contiguous()
    return found
