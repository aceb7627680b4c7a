"""`lora adapter`: look into a LoRA adapter, cut it down to a smaller rank, put several together."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from rich.table import Table
from safetensors.torch import save_file

from lora_cli.data.class_labels import LABELS_FILE as LABELS
from lora_cli.errors import LoraError
from lora_cli.merging import low_rank
from lora_cli.merging.low_rank import LoraWeights, LowRankFactors
from lora_cli.merging.merge_tensors import ReadWrite as Files
from lora_cli.model import base_model, safetensors_io, trained_on
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS
from lora_cli.model.target_modules import layer_index
from lora_cli.run import atomic, console
from lora_cli.setup.saved_adapter import open_saved_adapter, read_config

ENERGY_SHARES = (0.9, 0.95, 0.99)
COPIED_FILES = (
    trained_on.TRAINED_ON_FILE,
    LABELS,
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class ModuleStats(NamedTuple):
    """One module of an adapter."""

    module: str
    rank: int
    parameters: int
    norm: float  # of ΔW, Frobenius
    base_norm: float | None  # of W; None where the base is not at hand
    effective_rank: float
    ranks: dict[str, int]  # by the share of the energy that they keep
    singular_values: list[float]

    @property
    def relative(self) -> float | None:
        """‖ΔW‖/‖W‖."""
        return self.norm / self.base_norm if self.base_norm else None


def inspect(folder: Path, *, base_path: str | None, json_file: Path | None, plot: Path | None) -> None:
    """Print what the adapter in `folder` does to each kind of module, and how much of its rank it uses."""
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise LoraError(f"{option} {file}: there is no folder {file.parent}", hint="make it first")
    read_config(folder)
    saved = low_rank.read_lora(folder)
    norms = _base_norms(folder, base_path, saved)
    looks = [_module_stats(module, pair, norms.get(module)) for module, pair in saved.pairs.items()]
    looks = [look for look in looks if look.norm > 0]
    if not looks:
        raise LoraError(f"{folder}: every update is zero: it was never trained", hint="train it first")
    config, size = saved.config, (folder / ADAPTER_WEIGHTS).stat().st_size
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    counted = sum(look.parameters for look in looks) + sum(tensor.numel() for tensor in saved.others.values())
    console.out.print(
        f"{kind} on {config.base_model_name_or_path}: {len(looks)} modules, rank {_span([k.rank for k in looks])}, "
        f"{counted:,} parameters, {console.format_bytes(size)}"
    )
    console.out.print(_table(looks))
    if saved.others:
        console.out.print(f"beside them {len(saved.others)} tensors: {sorted(saved.others)[0]}, ...")
    if config.use_dora:
        console.out.print("of DoRA, B·A alone is looked at: its magnitudes scale W too")
    for share in ENERGY_SHARES:
        wanted = [look.ranks[f"{share:.2f}"] for look in looks]
        console.out.print(
            f"{share:.0%} of each update's energy: rank {max(wanted)} for all, "
            f"{sum(wanted) / len(wanted):.1f} on average"
        )
    if json_file is not None:
        records = [{**look._asdict(), "relative": look.relative} for look in looks]
        about = {"base": config.base_model_name_or_path, "method": kind, "parameters": counted, "bytes": size}
        atomic.write_json(json_file, {**about, "modules": records})
    if plot is not None:
        _plot(looks, plot)
        console.info(f"plotted in {plot}")


def _module_stats(module: str, pair: LowRankFactors, base_norm: float | None) -> ModuleStats:
    _, values, _ = pair.singular()
    return ModuleStats(
        module,
        pair.rank,
        pair.a.numel() + pair.b.numel(),
        float(values.square().sum().sqrt()),
        base_norm,
        low_rank.effective_rank(values),
        {f"{share:.2f}": low_rank.rank_for_energy(values, share) for share in ENERGY_SHARES},
        values.tolist(),
    )


def _base_norms(folder: Path, base_path: str | None, saved: LoraWeights) -> dict[str, float]:
    """‖W‖ of every adapted module, where the base's files are on this machine."""
    try:
        subject = open_saved_adapter(folder, saved.config, base_path=base_path, trust_remote_code=False)
        tensors = safetensors_io.list_tensors(base_model.local_folder(subject.source, fetch=False))
    except LoraError as reason:
        if base_path is not None:
            raise
        console.info(f"without the base's own norms: {reason.message}")
        return {}
    mapping = CheckpointMapping(subject.skeleton(), tensors)
    norms = {}
    with safetensors_io.ShardFiles(writable=False) as files:
        for module in saved.pairs:
            name = f"{module}.weight"
            if name in mapping.parts and not mapping.is_joined(name):
                weight = Files(files, files).read(tensors[mapping.key(name)])
                norms[module] = float(weight.float().norm())
    return norms


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _table(looks: list[ModuleStats]) -> Table:
    kinds: defaultdict[str, list[ModuleStats]] = defaultdict(list)
    for look in looks:
        kinds[_kind(look.module)].append(look)
    shares = [f"{share:.0%}" for share in ENERGY_SHARES]
    table = Table("", "modules", "rank", "|ΔW|", "|ΔW|/|W|", "most in", "eff. rank", *shares, box=None)
    for kind, group in kinds.items():
        largest = max(group, key=lambda look: look.relative or look.norm)
        relative = [look.relative for look in group if look.relative is not None]
        needed = [f"{sum(look.ranks[f'{share:.2f}'] for look in group) / len(group):.1f}" for share in ENERGY_SHARES]
        table.add_row(
            kind,
            str(len(group)),
            _span([look.rank for look in group]),
            f"{sum(look.norm for look in group) / len(group):.3f}",
            f"{sum(relative) / len(relative):.2%}" if relative else "?",
            "" if (number := layer_index(largest.module)) is None else f"layer {number}",
            f"{sum(look.effective_rank for look in group) / len(group):.1f}",
            *needed,
        )
    return table


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _plot(looks: list[ModuleStats], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LoraError("--plot needs matplotlib", hint='pip install "lora-cli[plot]"') from None
    figure = Figure(figsize=(11, 4.5), mapping="constrained")
    spectra, sizes = figure.subplots(1, 2)
    kinds: defaultdict[str, list[ModuleStats]] = defaultdict(list)
    for look in looks:
        kinds[_kind(look.module)].append(look)
    for kind, group in kinds.items():
        shared = min(look.rank for look in group)
        values = torch.tensor([look.singular_values[:shared] for look in group])
        middle = (values / values[:, :1].clamp_min(1e-30)).median(dim=0).values
        spectra.semilogy(range(1, shared + 1), middle, marker=".", label=kind)
        sizes.plot(range(len(group)), [look.relative or look.norm for look in group], marker=".", label=kind)
    spectra.set(xlabel="component", ylabel="singular value / largest", title="spectrum (median of the modules)")
    known = all(look.relative is not None for look in looks)
    sizes.set(
        xlabel="module, in the order of the layers",
        ylabel="|ΔW| / |W|" if known else "|ΔW|",
        title="size of the update",
    )
    sizes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)


def resize(folder: Path, *, out: Path, rank: int | None, energy: float | None, force: bool) -> None:
    """Write the adapter in `folder` with fewer components: as many for each module as `rank` or `energy` allows."""
    if (rank is None) == (energy is None):
        raise LoraError("--rank and --energy: one of the two says how small", hint="write --rank 8, or --energy 0.95")
    read_config(folder)
    saved = low_rank.read_lora(folder)
    if saved.config.use_dora:
        raise LoraError(
            f"{folder} is DoRA: its magnitudes belong to the whole of B·A", hint="merge it, or train a smaller one"
        )
    small = {}
    for module, pair in saved.pairs.items():
        wanted = rank if rank is not None else low_rank.rank_for_energy(pair.singular()[1], float(energy or 1))
        small[module] = low_rank.truncate_rank(pair, wanted)
    _write_adapter(
        small, saved, out, force=force, what=f"cut down from rank {_span([p.rank for p in saved.pairs.values()])}"
    )
    _tell_kept(saved.pairs, low_rank.read_lora(out).pairs)
    console.out.print(str(out))


def combine(
    given: list[str], *, out: Path, method: str, rank: int | None, density: float, seed: int, force: bool
) -> None:
    """Write the weighted sum of several adapters of one base, `DIR` or `WEIGHT*DIR` each, as one."""
    adapters, weights = [], []
    for item in given:
        weight, star, path = item.rpartition("*")
        try:
            weights.append(float(weight) if star else 1.0)
        except ValueError:
            raise LoraError(f"{item}: {weight} is no weight", hint="write 0.5*runs/a/adapter") from None
        read_config(Path(path))
        adapters.append(low_rank.read_lora(Path(path)))
    if len(adapters) < 2:
        raise LoraError("combine: one adapter is given", hint="name two or more")
    _refuse_apart(adapters)
    if method == "concat" and rank is not None:
        raise LoraError("--rank has no effect with --method concat", hint="write --method svd, or remove it")
    whole = low_rank.concatenate_factors(adapters, weights)
    most = rank or max(pair.rank for saved in adapters for pair in saved.pairs.values())
    match method:
        case "concat":
            made = whole
        case "svd":
            made = {module: low_rank.truncate_rank(pair, most) for module, pair in whole.items()}
        case "linear":
            made = low_rank.average_factors(adapters, weights)
        case _:
            dense = low_rank.combine_dense(adapters, weights, method=method, density=density, seed=seed)
            made = low_rank.factorize(dense, most, {module: pair.embedding for module, pair in whole.items()})
    names = ", ".join(f"{weight:g} of {saved.folder}" for weight, saved in zip(weights, adapters, strict=True))
    _write_adapter(made, adapters[0], out, force=force, what=f"{method} of {names}")
    if method in ("concat", "svd"):
        _tell_kept(whole, low_rank.read_lora(out).pairs)
    console.out.print(str(out))


def _refuse_apart(adapters: list[LoraWeights]) -> None:
    """What cannot be summed: other bases, and what is not of low rank."""
    first, known = adapters[0], trained_on.read_trained_on(adapters[0].folder)
    for saved in adapters:
        if saved.others:
            raise LoraError(
                f"{saved.folder}: {sorted(saved.others)[0]} is no update of low rank, and cannot be summed",
                hint="merge the adapters one after the other with lora merge",
            )
        here = trained_on.read_trained_on(saved.folder)
        if known and here and known.fingerprint != here.fingerprint:
            raise LoraError(
                f"{saved.folder} and {first.folder} were trained on different bases", hint="see trained_on.json"
            )
        named = saved.config.base_model_name_or_path
        if not (known and here) and named != first.config.base_model_name_or_path:
            console.info(f"note: {saved.folder} names its base {named}, and {first.folder} another")
        for module, pair in saved.pairs.items():
            other = first.pairs.get(module)
            if other and (other.a.shape[1], other.b.shape[0]) != (pair.a.shape[1], pair.b.shape[0]):
                raise LoraError(
                    f"{saved.folder}: {module} has another shape than in {first.folder}", hint="see the bases"
                )


def _write_adapter(pairs: dict[str, LowRankFactors], like: LoraWeights, out: Path, *, force: bool, what: str) -> None:
    if out.exists() and not force:
        raise LoraError(f"--out {out} exists", hint="name another folder, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")
    if out.resolve() == like.folder.resolve():
        raise LoraError(f"--out {out}: that is what is read", hint="name another folder")
    pairs = {module: pair for module, pair in pairs.items() if pair.rank}
    config: LoraConfig = low_rank.lora_config_for(pairs, like.config)
    with atomic.folder(out, replace=force) as partial:
        tensors: dict[str, Any] = {**low_rank.to_peft_tensors(pairs), **like.others}
        save_file(tensors, partial / ADAPTER_WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(partial))
        for name in COPIED_FILES:
            if (like.folder / name).is_file():
                shutil.copyfile(like.folder / name, partial / name)
        name = Path(str(config.base_model_name_or_path)).name
        text = f"---\nbase_model: {name}\nlibrary_name: peft\n---\n# LoRA of {name}\n\nA plain PEFT adapter, {what}.\n"
        (partial / "README.md").write_text(text, encoding="utf-8")


def _tell_kept(whole: dict[str, LowRankFactors], written: dict[str, LowRankFactors]) -> None:
    share = low_rank.energy_kept(whole, written)
    total = sum(pair.energy for pair in whole.values())
    kept = sum(share[module] * pair.energy for module, pair in whole.items()) / total
    worst = min(share, key=lambda module: share[module])
    console.info(
        f"rank {_span([pair.rank for pair in written.values()])}: {kept:.4%} of the energy kept, read back; "
        f"least {share[worst]:.4%} ({worst})"
    )
