"""`lora adapter` as a user types it: what is shown, what is written, and that any PEFT reads it."""

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
    """Of the base with the weighted sum of adapters, by plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained("base")
    folder, _ = adapters[0]
    both = PeftModel.from_pretrained(model, folder, adapter_name="0")
    for number, (path, _) in enumerate(adapters[1:], start=1):
        both.load_adapter(path, adapter_name=str(number))
    both.base_model.set_adapter([str(number) for number in range(len(adapters))])
    for module in both.modules():
        for number, (_, weight) in enumerate(adapters):
            if isinstance(getattr(module, "scaling", None), dict) and str(number) in module.scaling:
                module.scaling[str(number)] *= weight
    with torch.no_grad():
        return both.eval()(IDS).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def two(trained: Path, recipe: WriteRecipe, lora: Lora) -> None:
    """Adapters of one base in runs/a and runs/b."""
    recipe({"training.seed": 7, "adapter.rank": 6})
    assert lora("train", "recipe.yaml", "--output", "runs/b").code == 0


def test_inspect(trained: Path, lora: Lora):
    done = lora("adapter", "inspect", "runs/a/adapter", "--json", "a.json", "--plot", "a.png")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
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
    # Without the base's files it tells of the update alone.
    Path("base").rename("gone")
    alone = lora("adapter", "inspect", "runs/a/adapter")
    assert alone.code == 0, alone.err
    assert "without the norms of the base:" in alone.err


def test_resize_to_a_rank_and_to_an_energy(trained: Path, lora: Lora):
    whole = lora("adapter", "resize", "runs/a/adapter", "--rank", "4", "--out", "same")
    assert whole.code == 0, whole.err
    assert "100.0000% of the energy kept" in whole.err
    assert relative(logits(("same", 1.0)), logits(("runs/a/adapter", 1.0))) < 1e-5
    small = lora("adapter", "resize", "runs/a/adapter", "--energy", "0.9", "--out", "small")
    assert small.code == 0, small.err
    kept = re.search(r"rank ([\d-]+): ([\d.]+)% of the energy kept, read back; least ([\d.]+)%", small.err)
    assert kept is not None
    assert float(kept[2]) >= float(kept[3]) >= 90
    assert (Path("small") / "adapter_model.safetensors").stat().st_size < Path(
        "runs/a/adapter/adapter_model.safetensors"
    ).stat().st_size
    assert relative(logits(("small", 1.0)), logits(("runs/a/adapter", 1.0))) < 0.2
    assert lora("merge", "small", "--out", "merged").code == 0


def test_combine(two: None, lora: Lora):
    parts = [("runs/a/adapter", 0.5), ("runs/b/adapter", -1.0)]
    words = [f"{weight}*{path}" for path, weight in parts]
    done = lora("adapter", "combine", words[0], "--out", "sum", "--", words[1])
    assert done.code == 0, done.err
    assert relative(logits(("sum", 1.0)), logits(*parts)) < 1e-5
    config = json.loads(Path("sum/adapter_config.json").read_text())
    assert config["r"] == 10
    for method in ("svd", "ties", "dare"):
        found = lora("adapter", "combine", *words[:1], "runs/b/adapter", "--method", method, "--out", method)
        assert found.code == 0, found.err
        assert json.loads(Path(method, "adapter_config.json").read_text())["r"] == 6
        assert lora("merge", method, "--out", f"merged-{method}").code == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["resize", "runs/a/adapter", "--out", "x"], "--rank and --energy: exactly one is needed"),
        (["resize", "runs/a/adapter", "--rank", "2", "--out", "runs/a/adapter"], "--out runs/a/adapter exists"),
        (["resize", "base", "--rank", "2", "--out", "x"], "base has no adapter_config.json"),
        (["combine", "runs/a/adapter", "--out", "x"], "combine: there is only one adapter"),
        (["combine", "half*runs/a/adapter", "runs/a/adapter", "--out", "x"], "half*runs/a/adapter: half is not a weight"),
        (["combine", "runs/a/adapter", "runs/a/adapter", "--out", "x", "--method", "sum"], "--method sum is not known"),
        (["combine", "runs/a/adapter", "runs/a/adapter", "--out", "x", "--rank", "2"],
         "--rank has no effect with --method concat"),
        (["inspect", "runs/a"], "runs/a has no adapter_config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_two_lines(words: list[str], error: str, trained: Path, lora: Lora):
    done = lora("adapter", *words)
    assert (done.code, done.out) == (2, "")
    assert done.last_two[0] == f"error: {error}"
    assert not Path("x").exists()


def test_what_is_no_plain_lora(recipe: WriteRecipe, lora: Lora):
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
