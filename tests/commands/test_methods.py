"""Every adapter method through the commands check, train, eval, merge and train --resume."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_cli.model import target_modules
from lora_cli.recipe.methods import METHOD_FACTS
from tests.commands.conftest import Lora, WriteRecipe

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8, "final_rank": 2, "rotation_size": 8, "hidden_size": 32}


def recipe_changes(method: str) -> dict[str, Any]:
    """Return the changes of the tiny recipe that select a small adapter of `method`."""
    facts = METHOD_FACTS[method]
    options = {key: value for key, value in SMALL.items() if key in facts.options}
    return {
        "adapter": {"method": method, **options},
        "data.max_length": 64,
        **({"quantization": {"bits": facts.needs_bits}} if facts.needs_bits else {}),
    }


@pytest.mark.parametrize("method", METHOD_FACTS)
def test_every_method_is_checked_trained_measured_merged_and_resumed(method: str, recipe: WriteRecipe, lora: Lora):
    facts = METHOD_FACTS[method]
    recipe(recipe_changes(method))
    checked = lora("check", "recipe.yaml", "--rows", "0")
    assert checked.code == 0, checked.err
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert "verified: the adapter on disk" in result.err
    assert "Warning" not in checked.err + result.err
    # check counts on the meta device; train must count the same. EVA chooses its ranks from rows, so they may differ.
    counts = [re.search(r"([\d,]+) (?:trainable|parameters)", text) for text in (checked.out, result.err)]
    assert counts[0] is not None
    if method != "eva":
        assert counts[1] is not None
        assert counts[0][1] == counts[1][1]

    last = json.loads(Path("runs/a/metrics.jsonl").read_text().splitlines()[-1])
    measured = lora("eval", "runs/a", "--answers", "1")
    assert measured.code == 0, measured.err
    adapter = re.search(r"^ *adapter +([\d.]+)", measured.out, re.MULTILINE)
    assert adapter is not None
    assert float(adapter[1]) == pytest.approx(last["eval_loss"], abs=1e-3)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "runs/a/adapter")

    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    if facts.mergeable:
        assert (merged.code, merged.out) == (0, "merged\n"), merged.err
    else:
        assert merged.code == 2
        assert "adds virtual tokens before the prompt: it cannot be merged into weights" in merged.last_two[0]
        assert not Path("merged").exists()

    # A run resumed after its second step has the same adapter.
    shutil.rmtree("runs/a/checkpoints/step-00000004")
    expected = Path("runs/a/adapter/adapter_model.safetensors").read_bytes()
    again = lora("train", "recipe.yaml", "--resume")
    assert again.code == 0, again.err
    assert "resuming after step 2" in again.err
    assert Path("runs/a/adapter/adapter_model.safetensors").read_bytes() == expected


def test_adalora_ends_at_its_final_rank(recipe: WriteRecipe, lora: Lora):
    steps = {"max_steps": 30, "save_every": 10, "keep_checkpoints": 3, "eval_every": None, "learning_rate": 1e-2}
    recipe({**recipe_changes("adalora"), "training": steps})
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    ranks = [sum(pattern) for pattern in config["rank_pattern"].values()]
    assert len(ranks) == 14
    assert sum(ranks) == 2 * 14
    assert min(ranks) < max(ranks) <= 4, "AdaLoRA gives layers different ranks"
    expected = Path("runs/a/adapter/adapter_model.safetensors").read_bytes()
    for step in (20, 30):  # the remaining checkpoint was saved while ranks were being reduced
        shutil.rmtree(f"runs/a/checkpoints/step-{step:08d}")
    again = lora("train", "recipe.yaml", "--resume")
    assert again.code == 0, again.err
    assert Path("runs/a/adapter/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("base", [{"model.dtype": "bfloat16"}, {"quantization": {"bits": 4}}], ids=str)
def test_adalora_is_saved_in_fp32_for_every_dtype_of_the_base(base: dict[str, Any], recipe: WriteRecipe, lora: Lora):
    """After pruning, PEFT creates the remaining tensors in the dtype of the base."""
    steps = {"max_steps": 12, "eval_every": None, "learning_rate": 1e-2}
    recipe({**recipe_changes("adalora"), "training": steps, **base})
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    tensors = load_file("runs/a/adapter/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(len(t) for name, t in tensors.items() if "lora_A" in name) < 4 * 14, "ranks were dropped"
    is_bf16 = [t.to(torch.bfloat16).float().equal(t) for name, t in tensors.items() if "lora_A" in name and t.numel()]
    assert not any(is_bf16)


@pytest.mark.parametrize("method", ["vera", "oft", "ia3"])
def test_modules_to_save_get_no_adapter_inside(method: str, recipe: WriteRecipe, lora: Lora):
    changes = recipe_changes(method)
    changes["adapter"] = {**changes["adapter"], "modules_to_save": ["mlp"]}
    if method == "ia3":
        changes["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    recipe(changes)
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    names = load_file("runs/a/adapter/adapter_model.safetensors")
    inside = {name.partition(".mlp.")[2] for name in names if ".mlp." in name}
    assert inside == {"down_proj.weight", "gate_proj.weight", "up_proj.weight"}
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert merged.code == 0, merged.err


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("optimizer", ["adamw-8bit", "auto"])
def test_a_quantized_base_trains_with_auto_and_8bit_optimizers(
    bits: int, optimizer: str, recipe: WriteRecipe, lora: Lora
):
    recipe({"quantization": {"bits": bits}, "training.optimizer": optimizer})
    checked = lora("check", "recipe.yaml")
    assert checked.code == 0, checked.err
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    for text in (checked.out, result.err):
        assert ("optimizer: adamw (auto)" in text) is (optimizer == "auto")
    description = "4-bit nf4, double quantization, computed in float32" if bits == 4 else "int8 (LLM.int8)"
    assert f"its linear layers: {description}" in result.err
    size = re.search(r"([\d,]+) weights in \d+ KiB: (0\.\d+) bytes each", result.err)
    assert (size is not None) is (bits == 4)
    if size is not None:
        layers = target_modules.linear_layers(AutoModelForCausalLM.from_pretrained("base"))
        assert int(size[1].replace(",", "")) == sum(layer.weight.numel() for layer in layers.values())
        assert 0.5 < float(size[2]) < 1  # in such small layers, code tables are a large part
    assert "its linear layers: " + description in checked.out


@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw-8bit"])
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_paged_optimizer_on_the_cpu_is_refused(name: str, command: str, recipe: WriteRecipe, lora: Lora):
    recipe({"training.optimizer": name})
    result = lora(command, "recipe.yaml")
    assert result.code == 2
    assert result.last_two == [
        f"error: training.optimizer: {name} pages between a CUDA GPU and the host, but this run is on the cpu",
        f"hint: write {name.removeprefix('paged-')}, or auto",
    ]
