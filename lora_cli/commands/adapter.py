"""`lora adapter`: inspect a LoRA adapter, resize it to a smaller rank, combine several adapters into one."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.table import Table
from safetensors.torch import save_file

from lora_cli.data.check_template import check_template_files
from lora_cli.data.class_labels import LABELS_FILE
from lora_cli.errors import LoraError
from lora_cli.merging import low_rank
from lora_cli.merging.expert_factors import group_experts
from lora_cli.merging.low_rank import LoraWeights, LowRankFactors
from lora_cli.merging.spectrum import (
    ENERGY_SHARES,
    ModuleStats,
    by_kind,
    kind_stats,
    module_stats,
    rank_range,
)
from lora_cli.model import safetensors_io
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.model_source import local_folder
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS, TOKENIZER_FILES, sets_in_order
from lora_cli.model.saved_adapter import find_base
from lora_cli.model.target_modules import layer_index
from lora_cli.model.trained_on import TRAINED_ON_FILE
from lora_cli.run import atomic, console
from lora_cli.run.checksums import verified_folder
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.redact import redact_path
from lora_cli.run.shell import shell_path
from lora_cli.run.workspace import remove_leftovers

COPIED_FILES = (
    TRAINED_ON_FILE,
    LABELS_FILE,
    *TOKENIZER_FILES,
)


def inspect(folder: Path, *, base_path: str | None, plot: Path | None) -> dict[str, Any]:
    """Print the size of the updates for each kind of module, and how much of the rank they use; return all statistics.

    Args:
        folder: of a run or a LoRA adapter.
        base_path: base in place of the one that the adapter names.
        plot: PNG file for spectra and sizes.

    Raises:
        LoraError: `folder` is not a LoRA adapter or was never trained, or matplotlib is not installed.
    """
    adapter = low_rank.read_lora(open_adapter(folder))
    norms = _base_norms(adapter, base_path)
    stats = [module_stats(module, factors, norms.get(module)) for module, factors in adapter.factors.items()]
    untrained = [module.module for module in stats if module.norm == 0]
    stats = [module for module in stats if module.norm > 0]
    if not stats:
        raise LoraError(f"{folder}: every update is zero: it was never trained", hint="train it first")
    config, size = adapter.config, (folder / ADAPTER_WEIGHTS).stat().st_size
    method = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    parameters = sum(module.parameters for module in stats) + sum(t.numel() for t in adapter.other_tensors.values())
    console.out.print(
        f"{method} on {config.base_model_name_or_path}: {len(stats)} modules, "
        f"rank {rank_range([module.rank for module in stats])}, {parameters:,} parameters, {console.format_bytes(size)}"
    )
    console.print_table(_table(stats))
    if adapter.other_tensors:
        names = sorted(adapter.other_tensors)
        console.out.print(f"and {len(names)} other tensors: {names[0]}, ...")
    if untrained:
        console.out.print(f"and {len(untrained):,} modules whose update is zero: {untrained[0]}, ...")
    if config.use_dora:
        console.out.print("these figures are of DoRA's B·A alone: its magnitudes scale W too")
    for share in ENERGY_SHARES:
        ranks = [module.ranks[f"{share:.2f}"] for module in stats]
        console.out.print(
            f"{share:.0%} of each update's energy: rank {max(ranks)} for all, {sum(ranks) / len(ranks):.1f} on average"
        )
    if plot is not None:
        _plot(stats, plot)
        console.info(f"plotted in {plot}")
    records = [{**module._asdict(), "relative": module.relative} for module in stats]
    summary = {"base": config.base_model_name_or_path, "method": method, "parameters": parameters, "bytes": size}
    return {**summary, "modules": records}


def _base_norms(adapter: LoraWeights, base_path: str | None) -> dict[str, float]:
    """Return ‖W‖ of every adapted module, if the base's files are on this machine."""
    try:
        base = find_base(adapter.files, path=base_path, trust_remote_code=False).base
        tensors = safetensors_io.list_tensors(local_folder(base.source, fetch=False))
    except LoraError as reason:
        name = adapter.config.base_model_name_or_path
        if base_path is not None or (name and os.path.lexists(name)):  # it is here, and cannot be opened
            raise
        console.info(f"without the norms of the base: {reason.message}")
        return {}
    mapping = CheckpointMapping(base.skeleton(), tensors)
    norms: dict[str, float] = {}
    with safetensors_io.ShardFiles(writable=False) as files:
        for target, group in group_experts(adapter.factors).items():
            name = target if target in adapter.wrappers else f"{target}.weight"
            if name in mapping.parts and (len(group) > 1 or not mapping.is_joined(name)):
                weight = mapping.to_parameter(name, lambda key: files.read_tensor(tensors[key]))
                parts = weight if len(group) > 1 else [weight]
                norms |= {module: float(part.float().norm()) for module, part in zip(group, parts, strict=True)}
    return norms


def _table(stats: list[ModuleStats]) -> Table:
    shares = [f"{share:.0%}" for share in ENERGY_SHARES]
    table = Table(
        "",
        "modules",
        "rank",
        "|ΔW|",
        "|ΔW|/|W|",
        "most in",
        "eff. rank",
        *shares,
        box=None,
    )
    for kind, group in by_kind(stats).items():
        means = kind_stats(kind, group)
        largest = max(group, key=lambda module: module.relative or module.norm)
        relative = [module.relative for module in group if module.relative is not None]
        table.add_row(
            kind,
            str(means.modules),
            means.rank,
            f"{means.norm:.3f}",
            f"{sum(relative) / len(relative):.2%}" if relative else "?",
            "" if (number := layer_index(largest.module)) is None else f"layer {number}",
            f"{means.effective_rank:.1f}",
            *(f"{rank:.1f}" for rank in means.energy_ranks.values()),
        )
    return table


def _plot(stats: list[ModuleStats], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LoraError("--plot needs matplotlib", hint='pip install "lora-cli[plot]"') from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    spectra, sizes = figure.subplots(1, 2)
    for kind, group in by_kind(stats).items():
        spectrum = kind_stats(kind, group).spectrum
        spectra.semilogy(range(1, len(spectrum) + 1), spectrum, marker=".", label=kind)
        sizes.plot(range(len(group)), [module.relative or module.norm for module in group], marker=".", label=kind)
    spectra.set(xlabel="component", ylabel="singular value / largest", title="spectrum (median of the modules)")
    has_base = all(module.relative is not None for module in stats)
    sizes.set(
        xlabel="module, in the order of the layers",
        ylabel="|ΔW| / |W|" if has_base else "|ΔW|",
        title="size of the update",
    )
    sizes.legend(fontsize="small", ncols=2)
    with atomic.file(file, replace=True) as partial:
        figure.savefig(partial, dpi=120, format=file.suffix.lstrip(".") or "png")


def resize(folder: Path, *, out: Path, rank: int | None, energy: float | None, force: bool) -> dict[str, Any]:
    """Write the adapter in `folder` with fewer components for each module; return the figures for JSON.

    Args:
        folder: of a run or a LoRA adapter.
        out: folder of the new adapter.
        rank: largest rank of a module; None if `energy` is set.
        energy: share of each update's energy to keep, 0 to 1; None if `rank` is set.
        force: replace `out` if it exists.

    Raises:
        LoraError: the adapter cannot be resized.
    """
    remove_leftovers(out.absolute().parent, out.name)  # of a command that was killed
    check_template_files(folder)  # copied into the result
    adapter = low_rank.read_lora(open_adapter(folder))
    if adapter.config.use_dora:
        raise LoraError(
            f"{folder} is DoRA: its magnitudes were trained with the full B·A", hint="merge it, or train a smaller one"
        )
    small = {}
    for module, factors in adapter.factors.items():
        new_rank = rank if rank is not None else low_rank.rank_for_energy(factors.svd()[1], float(energy or 1))
        small[module] = low_rank.truncate_rank(factors, new_rank)
    before = rank_range([factors.rank for factors in adapter.factors.values()])
    _write_adapter(small, adapter, out, replace=force, what=f"resized from rank {before}")
    kept = _energy_kept(adapter.factors, low_rank.read_lora(open_adapter(out)).factors)
    console.out.print(str(out))
    return {"out": out, **kept}


def combine(
    folders: Sequence[Path],
    weights: Sequence[float],
    *,
    out: Path,
    method: str,
    rank: int | None,
    density: float,
    seed: int,
    force: bool,
) -> dict[str, Any]:
    """Write the weighted sum of several adapters of one base as one adapter; return the figures for JSON.

    Args:
        folders: of the adapters.
        weights: of each adapter.
        out: folder of the new adapter.
        method: concat, svd, linear, ties or dare.
        rank: of svd, ties and dare; the largest of the adapters if None.
        density: share of entries that ties and dare keep, 0 to 1.
        seed: of dare's random selection.
        force: replace `out` if it exists.

    Raises:
        LoraError: the adapters cannot be combined.
    """
    remove_leftovers(out.absolute().parent, out.name)  # of a command that was killed
    check_template_files(folders[0])  # copied into the result
    adapters = [low_rank.read_lora(open_adapter(folder)) for folder in folders]
    _check_combinable(adapters)
    if method == "concat" and rank is not None:
        raise LoraError("--rank has no effect with --method concat", hint="write --method svd, or remove it")
    wrappers = adapters[0].wrappers
    if any(adapter.wrappers != wrappers for adapter in adapters):
        raise LoraError(
            "combine: the adapters adapt different expert weights, which PEFT cannot nest into one adapter",
            hint="merge the adapters one after the other with lora merge",
        )
    exact = low_rank.concatenate_factors(adapters, weights)
    max_rank = rank or max(factors.rank for adapter in adapters for factors in adapter.factors.values())
    match method:
        case "concat":
            combined = exact
        case "svd":
            combined = {module: low_rank.truncate_rank(factors, max_rank) for module, factors in exact.items()}
        case "linear":
            combined = low_rank.average_factors(adapters, weights)
        case _:
            dense = low_rank.combine_dense(adapters, weights, method=method, density=density, seed=seed)
            embeddings = {module: factors.is_embedding for module, factors in exact.items()}
            combined = low_rank.factorize(dense, max_rank, embeddings)
    names = ", ".join(
        f"{weight:g} of {_public_name(adapter.folder)}" for weight, adapter in zip(weights, adapters, strict=True)
    )
    _write_adapter(combined, adapters[0], out, replace=force, what=f"{method} of {names}")
    kept = {}
    if method in ("concat", "svd"):
        kept = _energy_kept(exact, low_rank.read_lora(open_adapter(out)).factors)
    console.out.print(str(out))
    return {"out": out, "method": method, **kept}


def _public_name(folder: Path) -> str:
    """Return the name of an adapter for the model card, without folders of this machine."""
    run = folder.parent.name if folder.name == "adapter" else folder.name
    return run if folder.is_absolute() else str(folder)


def _check_combinable(adapters: list[LoraWeights]) -> None:
    """Raise if the adapters have different bases, or tensors that are not low-rank updates."""
    first, first_base = adapters[0], adapters[0].files.trained_on
    for adapter in adapters:
        if adapter.other_tensors:
            raise LoraError(
                f"{adapter.folder}: {sorted(adapter.other_tensors)[0]} is not a low-rank update, and cannot be summed",
                hint="merge the adapters one after the other with lora merge",
            )
        base = adapter.files.trained_on
        if first_base and base and first_base.fingerprint != base.fingerprint:
            raise LoraError(
                f"{adapter.folder} and {first.folder} were trained on different bases", hint="see trained_on.json"
            )
        base_name = adapter.config.base_model_name_or_path
        if not (first_base and base) and base_name != first.config.base_model_name_or_path:
            console.info(f"note: {adapter.folder} names its base {base_name}, and {first.folder} another")
        for module, factors in adapter.factors.items():
            other = first.factors.get(module)
            if other and (other.a.shape[1], other.b.shape[0]) != (factors.a.shape[1], factors.b.shape[0]):
                raise LoraError(
                    f"{adapter.folder}: {module} has another shape than in {first.folder}",
                    hint="combine adapters of the same base only",
                )


def _write_adapter(
    factors: dict[str, LowRankFactors], like: LoraWeights, out: Path, *, replace: bool, what: str
) -> None:
    factors = {module: each for module, each in factors.items() if each.rank}
    wrappers = like.wrappers
    config: LoraConfig = low_rank.lora_config_for(factors, like.config, parameters=wrappers)
    base: str | None = config.base_model_name_or_path
    if base is not None and redact_path(base) != base:
        config.base_model_name_or_path = redact_path(base)
        console.info(
            f"note: {out} names its base {redact_path(base)}, without its folder: use it with --base {shell_path(base)}"
        )
    tensors: dict[str, Any] = {**low_rank.to_peft_tensors(factors, wrappers), **like.other_tensors}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise LoraError(f"{name} of the result is too large for fp32", hint="use smaller weights")
    check_free_space([Need(out, sum(tensor.nbytes for tensor in tensors.values()), "the adapter")])
    with verified_folder(out, kind="adapter", published=True, replace=replace) as partial:
        save_file(tensors, partial / ADAPTER_WEIGHTS, {"format": "pt"})
        with sets_in_order(config):
            config.save_pretrained(str(partial))
        for name in COPIED_FILES:
            if (like.folder / name).is_file():
                shutil.copyfile(like.folder / name, partial / name)
        name = Path(str(base)).name
        text = f"---\nbase_model: {name}\nlibrary_name: peft\n---\n# LoRA of {name}\n\nA plain PEFT adapter, {what}.\n"
        (partial / "README.md").write_text(text, encoding="utf-8")


def _energy_kept(original: dict[str, LowRankFactors], written: dict[str, LowRankFactors]) -> dict[str, Any]:
    """Print the rank and the energy kept of an adapter that was written; return them for JSON."""
    ranks = [factors.rank for factors in written.values()]
    record: dict[str, Any] = {"rank": {"min": min(ranks, default=0), "max": max(ranks, default=0)}, "energy_kept": None}
    shares = low_rank.energy_kept(original, written)
    total = sum(factors.energy for factors in original.values())
    if not total:  # an untrained adapter, or weights that cancel out
        console.info("note: every update is zero")
        return record
    kept = sum(shares[module] * factors.energy for module, factors in original.items()) / total
    worst = min(shares, key=lambda module: shares[module])
    console.info(
        f"rank {rank_range(ranks)}: {kept:.4%} of the energy kept, read back; least {shares[worst]:.4%} ({worst})"
    )
    least = {"module": worst, "share": shares[worst]}
    return {**record, "energy_kept": kept, "least_energy_kept": least}
