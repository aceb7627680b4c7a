"""`lora adapter inspect`, `resize` and `combine`: their output, and that plain PEFT loads the written adapters."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.commands.conftest import Lora, WriteRecipe

IDS = torch.arange(3, 40)[None]


def logits(*adapters: tuple[str, float]) -> torch.Tensor:
    """Return the logits of the base with the weighted sum of `adapters`, computed by plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained("base")
    folder, _ = adapters[0]
    model = PeftModel.from_pretrained(base, folder, adapter_name="0")
    for number, (path, _) in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    for module in model.modules():
        for number, (_, weight) in enumerate(adapters):
            if isinstance(getattr(module, "scaling", None), dict) and str(number) in module.scaling:
                module.scaling[str(number)] *= weight
    with torch.no_grad():
        return model.eval()(IDS).logits


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture
def two_adapters(trained_run: Path, recipe: WriteRecipe, lora: Lora) -> None:
    """Write adapters of the same base to runs/a and runs/b."""
    recipe({"training.seed": 7, "adapter.rank": 6})
    assert lora("train", "recipe.yaml", "--output", "runs/b").code == 0


@pytest.mark.slow
def test_inspect_prints_the_norm_and_effective_rank_of_each_module(trained_run: Path, lora: Lora):
    result = lora("adapter", "inspect", "runs/a/adapter", "--json", "a.json", "--plot", "a.png")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert re.fullmatch(r"LoRA on base: 14 modules, rank 4, [\d,]+ parameters, \d+ \w+", lines[0])
    rows = {line.split()[0]: line.split() for line in lines[2:9]}
    assert rows.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    report = json.loads(Path("a.json").read_text())
    weights = AutoModelForCausalLM.from_pretrained("base").state_dict()
    for module in report["modules"]:
        assert module["base_norm"] == pytest.approx(float(weights[f"{module['module']}.weight"].norm()), rel=1e-5)
        assert module["relative"] == pytest.approx(module["norm"] / module["base_norm"])
        assert 1 <= module["effective_rank"] <= module["rank"] == 4
        assert sorted(module["singular_values"], reverse=True) == module["singular_values"]
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    # Without the base's files, inspect reports the update only.
    Path("base").rename("moved")
    without_base = lora("adapter", "inspect", "runs/a/adapter")
    assert without_base.code == 0, without_base.err
    assert "without the norms of the base:" in without_base.err


def test_resize_to_a_rank_and_to_an_energy(trained_run: Path, lora: Lora):
    same_rank = lora("adapter", "resize", "runs/a/adapter", "--rank", "4", "--out", "same")
    assert same_rank.code == 0, same_rank.err
    assert "100.0000% of the energy kept" in same_rank.err
    assert relative(logits(("same", 1.0)), logits(("runs/a/adapter", 1.0))) < 1e-5
    small = lora("adapter", "resize", "runs/a/adapter", "--energy", "0.9", "--out", "small")
    assert small.code == 0, small.err
    modules = json.loads(Path("small/adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules), "PEFT keeps them in a set, in an order of its own"
    energy = re.search(r"rank ([\d-]+): ([\d.]+)% of the energy kept, read back; least ([\d.]+)%", small.err)
    assert energy is not None
    assert float(energy[2]) >= float(energy[3]) >= 90
    assert (Path("small") / "adapter_model.safetensors").stat().st_size < Path(
        "runs/a/adapter/adapter_model.safetensors"
    ).stat().st_size
    assert relative(logits(("small", 1.0)), logits(("runs/a/adapter", 1.0))) < 0.2
    assert lora("merge", "small", "--out", "merged").code == 0


def test_updates_that_cancel_out_are_written_with_a_note(trained_run: Path, lora: Lora):
    result = lora("adapter", "combine", "runs/a/adapter", "--out", "zero", "--", "-1*runs/a/adapter")
    assert result.code == 0, result.err
    assert "note: every update is zero" in result.err
    assert relative(logits(("zero", 1.0)), logits(("runs/a/adapter", 0.0))) < 1e-5
    resized = lora("adapter", "resize", "zero", "--rank", "2", "--out", "small")
    assert resized.code == 0, resized.err
    assert "note: every update is zero" in resized.err


def test_combine_writes_the_weighted_sum_of_two_adapters(two_adapters: None, lora: Lora):
    parts = [("runs/a/adapter", 0.5), ("runs/b/adapter", -1.0)]
    arguments = [f"{weight}*{path}" for path, weight in parts]
    result = lora("adapter", "combine", arguments[0], "--out", "sum", "--", arguments[1])
    assert result.code == 0, result.err
    assert relative(logits(("sum", 1.0)), logits(*parts)) < 1e-5
    config = json.loads(Path("sum/adapter_config.json").read_text())
    assert config["r"] == 10
    for method in ("svd", "ties", "dare"):
        combined = lora("adapter", "combine", *arguments[:1], "runs/b/adapter", "--method", method, "--out", method)
        assert combined.code == 0, combined.err
        assert json.loads(Path(method, "adapter_config.json").read_text())["r"] == 6
        assert lora("merge", method, "--out", f"merged-{method}").code == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["resize", "runs/a/adapter", "--out", "x"], "--rank and --energy: exactly one is needed"),
        (["resize", "runs/a/adapter", "--rank", "2", "--out", "base"], "--out base is a link to "),
        (["resize", "runs/a", "--rank", "2", "--out", "runs/a", "--force"],
         "--out runs/a contains runs/a/adapter, an input of the resize"),
        (["combine", "runs/a", "runs/a/adapter", "--out", "runs/a/adapter", "--force"],
         "--out runs/a/adapter is an input of the combine"),
        (["resize", "base", "--rank", "2", "--out", "x"], "base is a model, not an adapter"),
        (["combine", "runs/a/adapter", "--out", "x"], "combine: there is only one adapter"),
        (["combine", "half*runs/a/adapter", "runs/a/adapter", "--out", "x"],
         "half*runs/a/adapter: half is not a weight"),
        (["combine", "runs/a/adapter", "runs/a/adapter", "--out", "x", "--method", "sum"], "--method sum is not known"),
        (["combine", "runs/a/adapter", "runs/a/adapter", "--out", "x", "--rank", "2"],
         "--rank has no effect with --method concat"),
        (["inspect", "runs"], "runs has no adapter_config.json"),
    ],
)  # fmt: skip
def test_wrong_arguments_give_an_error_and_write_nothing(
    arguments: list[str], error: str, trained_run: Path, lora: Lora
):
    result = lora("adapter", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.last_two[0].startswith(f"error: {error}")
    assert not Path("x").exists()


def test_methods_other_than_plain_lora_are_refused_where_factors_are_needed(recipe: WriteRecipe, lora: Lora):
    recipe({"adapter": {"method": "vera", "rank": 4}})
    assert lora("train", "recipe.yaml").code == 0
    assert lora("adapter", "inspect", "runs/a/adapter").last_two == [
        "error: runs/a/adapter is vera, which has no factors A and B",
        "hint: use a LoRA adapter",
    ]
    recipe({"adapter": {"method": "dora", "rank": 4}, "output": "runs/d"})
    assert lora("train", "recipe.yaml").code == 0
    assert lora("adapter", "inspect", "runs/d/adapter").code == 0
    refused = lora("adapter", "resize", "runs/d/adapter", "--rank", "2", "--out", "x")
    assert refused.last_two[0] == "error: runs/d/adapter is DoRA: its magnitudes were trained with the full B·A"
    several = lora("adapter", "combine", "runs/d/adapter", "runs/d/adapter", "--out", "x")
    assert "is not a low-rank update, and cannot be summed" in several.last_two[0]
