"""Laws of low-rank updates: factors compared with dense updates, and with PEFT's results for the same adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from lora_cli.commands import adapter
from lora_cli.errors import LoraError
from lora_cli.merging import low_rank
from lora_cli.merging.low_rank import LoraWeights, LowRankFactors
from lora_cli.model import save_adapter
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.load_adapter import load_adapter
from tests.model import families, zoo
from tests.support import checkpoints


def save_and_read(folder: Path, *, seed: int = 0, **options: Any) -> tuple[LoraWeights, dict[str, Tensor]]:
    """Save an adapter and read it back; also return PEFT's own dense updates of it, by module."""
    model = zoo.adapted(zoo.make("llama"), seed=seed, **{"rank": 4, "alpha": 8, **options})
    save_adapter.save_adapter(model, folder, base="base", revision=None)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    return low_rank.read_lora(open_adapter(folder)), {
        name: layer.get_delta_weight("default").detach() for name, layer in layers.items()
    }


def dense(factors: LowRankFactors) -> Tensor:
    update = factors.b @ factors.a
    return update.T if factors.is_embedding else update


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "rslora"},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.1\..*_proj": 3.0}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_the_factors_equal_pefts_updates(options: dict[str, Any], tmp_path: Path):
    adapter, expected = save_and_read(tmp_path / "a", **options)
    assert adapter.factors.keys() == expected.keys()
    for module, factors in adapter.factors.items():
        assert zoo.relative(dense(factors).float(), expected[module]) < 1e-6
        assert factors.energy == pytest.approx(float(expected[module].double().square().sum()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
def test_the_factors_of_experts_equal_pefts_updates_and_are_written_back(kind: str, tmp_path: Path):
    """One pair of factors for each expert; gpt-oss stores its weights as [experts, in, out]."""
    families.write(families.FAMILIES[kind], tmp_path / "base")

    def updates(folder: Path) -> dict[str, Tensor]:
        model = load_adapter(checkpoints.load(tmp_path / "base"), open_adapter(folder), base="base")
        found = {}
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "parameter_name"):
                delta = layer.get_delta_weight("default").detach()
                owner = name.replace(".base_layer", "")
                found |= {f"{owner}.{layer.parameter_name}[{e}]": each for e, each in enumerate(delta)}
        return found

    folders = []
    for seed in range(2):
        model = zoo.adapted(checkpoints.load(tmp_path / "base"), seed=seed, rank_pattern={"gate_up_proj": 6})
        folders.append(tmp_path / f"adapter-{seed}")
        save_adapter.save_adapter(model, folders[-1], base="base", revision=None)
    adapters = [low_rank.read_lora(open_adapter(folder)) for folder in folders]
    expected = [updates(folder) for folder in folders]
    for found, each in zip(adapters, expected, strict=True):
        stacked = {name: factors for name, factors in found.factors.items() if name.endswith("]")}
        assert stacked.keys() == each.keys()
        for name, factors in stacked.items():
            update = (factors.b @ factors.a).float()
            assert zoo.relative(update.T if kind == "gpt-oss" else update, each[name]) < 1e-6
    adapter.resize(folders[0], out=tmp_path / "same", rank=6, energy=None, force=False)
    adapter.resize(folders[0], out=tmp_path / "small", rank=None, energy=0.9, force=False)
    options = {"method": "concat", "rank": None, "density": 1.0, "seed": 0, "force": False}
    adapter.combine(folders[:2], [1.0, -0.5], out=tmp_path / "sum", **options)
    same, small, total = (updates(tmp_path / name) for name in ("same", "small", "sum"))
    for name, update in expected[0].items():
        assert zoo.relative(same[name], update) < 1e-5
        assert float((small[name] - update).square().sum() / update.square().sum()) < 0.1 + 1e-5
        assert zoo.relative(total[name], update - 0.5 * expected[1][name]) < 1e-5


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 1000),
    keep=st.integers(1, 14),
)  # fmt: skip
def test_singular_values_and_truncation_equal_those_of_the_dense_update(
    rows: int, columns: int, rank: int, seed: int, keep: int
):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, columns), (rows, rank)))
    factors = LowRankFactors(a, b, is_embedding=False)
    expected = torch.linalg.svdvals(b @ a)
    _, values, _ = factors.svd()
    shared = min(len(values), len(expected))
    assert torch.allclose(values[:shared], expected[:shared], atol=1e-9)
    assert bool((values[shared:] < 1e-9).all())
    truncated = low_rank.truncate_rank(factors, keep)
    lost = float((expected[keep:] ** 2).sum())
    assert truncated.rank <= min(keep, rank)
    kept = low_rank.energy_kept({"m": factors}, {"m": truncated})["m"]
    assert kept == pytest.approx(1 - lost / float((expected**2).sum()), abs=1e-9)


def test_a_resized_adapter_keeps_its_own_biases(tmp_path: Path):
    base = zoo.make("qwen2").eval()
    config = LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    model.save_pretrained(str(tmp_path / "a"))
    ids = torch.arange(2, 90)[None]
    with torch.no_grad():
        expected = model(ids).logits
        adapter.resize(tmp_path / "a", out=tmp_path / "b", rank=4, energy=None, force=False)
        resized = load_adapter(zoo.make("qwen2"), open_adapter(tmp_path / "b"), base="base").eval()
        assert zoo.relative(resized(ids).logits, expected) < 1e-5


def test_rank_for_energy_and_effective_rank():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # energies 9, 4, 1 of 14
    assert [low_rank.rank_for_energy(values, share) for share in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert low_rank.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert low_rank.effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)


def test_concatenated_sums_are_exact_and_missing_modules_count_as_zero(tmp_path: Path):
    first, first_updates = save_and_read(tmp_path / "a", seed=1)
    second, second_updates = save_and_read(tmp_path / "b", seed=2, rank=6, target_modules=["q_proj"])
    combined = low_rank.concatenate_factors([first, second], [0.5, -2.0])
    assert combined.keys() == first_updates.keys()
    for module, factors in combined.items():
        update = first_updates[module]
        expected = 0.5 * update - 2.0 * second_updates.get(module, torch.zeros_like(update))
        assert zoo.relative(dense(factors).float(), expected) < 1e-6
        assert factors.rank == (10 if module in second_updates else 4)


def test_averaged_factors_equal_pefts_linear_combination(tmp_path: Path):
    first, _ = save_and_read(tmp_path / "a", seed=1)
    second, _ = save_and_read(tmp_path / "b", seed=2, alpha=2)
    model = PeftModel.from_pretrained(zoo.make("llama"), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="linear")
    combined = low_rank.average_factors([first, second], [0.7, 0.3])
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            assert zoo.relative(dense(combined[name]).float(), layer.get_delta_weight("both")) < 1e-5
    with pytest.raises(LoraError, match="other modules or ranks"):
        low_rank.average_factors([first, save_and_read(tmp_path / "c", rank=2)[0]], [1.0, 1.0])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_equal_pefts_on_the_dense_updates(method: str, tmp_path: Path):
    adapters = [save_and_read(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    weights = [1.0, 0.5, 2.0]
    combined = low_rank.combine_dense([saved for saved, _ in adapters], weights, method=method, density=0.3, seed=3)
    torch.manual_seed(3)
    function = ties if method == "ties" else dare_linear
    for module in adapters[0][0].factors:
        expected = function([updates[module] for _, updates in adapters], torch.tensor(weights), 0.3)
        assert zoo.relative(combined[module].float(), expected) < 1e-5
    full_rank = low_rank.factorize(combined, 64, dict.fromkeys(combined, False))
    assert all(zoo.relative(dense(full_rank[module]), combined[module]) < 1e-9 for module in combined)
    rank_2 = low_rank.factorize(combined, 2, dict.fromkeys(combined, False))
    assert all(factors.rank == 2 for factors in rank_2.values())
