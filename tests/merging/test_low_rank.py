"""Laws of low-rank updates: factors against dense sums, and against what PEFT does with the same adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.merging import low_rank
from lora_cli.merging.low_rank import LoraWeights, LowRankFactors
from lora_cli.model import save_adapter
from tests.model import zoo


def write(folder: Path, *, seed: int = 0, **given: Any) -> tuple[LoraWeights, dict[str, Tensor]]:
    """An adapter as it is read from disk, and PEFT's own dense updates of it."""
    model = zoo.adapted(zoo.make("llama"), seed=seed, **{"rank": 4, "alpha": 8, **given})
    save_adapter.save_adapter(model, folder, base="base", revision=None)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    return low_rank.read_lora(folder), {
        name: layer.get_delta_weight("default").detach() for name, layer in layers.items()
    }


def dense(pair: LowRankFactors) -> Tensor:
    update = pair.b @ pair.a
    return update.T if pair.embedding else update


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
def test_the_factors_are_pefts_updates(options: dict[str, Any], tmp_path: Path):
    saved, expected = write(tmp_path / "a", **options)
    assert saved.pairs.keys() == expected.keys()
    for module, pair in saved.pairs.items():
        assert zoo.relative(dense(pair).float(), expected[module]) < 1e-6
        assert pair.energy == pytest.approx(float(expected[module].double().square().sum()), rel=1e-5)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 1000),
    keep=st.integers(1, 14),
)  # fmt: skip
def test_singular_values_and_the_nearest_update_are_those_of_the_dense_one(
    rows: int, columns: int, rank: int, seed: int, keep: int
):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, columns), (rows, rank)))
    pair = LowRankFactors(a, b, embedding=False)
    expected = torch.linalg.svdvals(b @ a)
    _, values, _ = pair.singular()
    shared = min(len(values), len(expected))
    assert torch.allclose(values[:shared], expected[:shared], atol=1e-9)
    assert bool((values[shared:] < 1e-9).all())
    small = low_rank.truncate_rank(pair, keep)
    missed = float((expected[keep:] ** 2).sum())
    assert small.rank <= min(keep, rank)
    found = low_rank.energy_kept({"m": pair}, {"m": small})["m"]
    assert found == pytest.approx(1 - missed / float((expected**2).sum()), abs=1e-9)


def test_ranks_that_an_energy_needs():
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


def test_sums_are_exact_and_what_one_has_not_counts_as_zero(tmp_path: Path):
    first, one = write(tmp_path / "a", seed=1)
    second, two = write(tmp_path / "b", seed=2, rank=6, target_modules=["q_proj"])
    summed = low_rank.concatenate_factors([first, second], [0.5, -2.0])
    assert summed.keys() == one.keys()
    for module, pair in summed.items():
        expected = 0.5 * one[module] - 2.0 * two.get(module, torch.zeros_like(one[module]))
        assert zoo.relative(dense(pair).float(), expected) < 1e-6
        assert pair.rank == (10 if module in two else 4)


def test_linear_is_pefts(tmp_path: Path):
    first, _ = write(tmp_path / "a", seed=1)
    second, _ = write(tmp_path / "b", seed=2, alpha=2)
    model = PeftModel.from_pretrained(zoo.make("llama"), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="linear")
    found = low_rank.average_factors([first, second], [0.7, 0.3])
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            assert zoo.relative(dense(found[name]).float(), layer.get_delta_weight("both")) < 1e-5
    with pytest.raises(LoraError, match="other modules or ranks"):
        low_rank.average_factors([first, write(tmp_path / "c", rank=2)[0]], [1.0, 1.0])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_votes_are_pefts_on_the_dense_updates(method: str, tmp_path: Path):
    parts = [write(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    weights = [1.0, 0.5, 2.0]
    found = low_rank.combine_dense([saved for saved, _ in parts], weights, method=method, density=0.3, seed=3)
    torch.manual_seed(3)
    function = ties if method == "ties" else dare_linear
    for module in parts[0][0].pairs:
        expected = function([updates[module] for _, updates in parts], torch.tensor(weights), 0.3)
        assert zoo.relative(found[module].float(), expected) < 1e-5
    again = low_rank.factorize(found, 64, dict.fromkeys(found, False))
    assert all(zoo.relative(dense(again[module]), found[module]) < 1e-9 for module in found)
    small = low_rank.factorize(found, 2, dict.fromkeys(found, False))
    assert all(pair.rank == 2 for pair in small.values())
