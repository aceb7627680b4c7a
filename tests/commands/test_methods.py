"""Every adapter method as a user meets it: checked, trained, resumed, measured, and merged or told why not."""

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

from lora_cli.recipe.methods import METHOD_FACTS
from tests.commands.conftest import Lora, WriteRecipe

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8, "final_rank": 2, "rotation_size": 8, "hidden_size": 32}


def changes_for(method: str) -> dict[str, Any]:
    facts = METHOD_FACTS[method]
    options = {key: value for key, value in SMALL.items() if key in facts.options}
    return {
        "adapter": {"method": method, **options},
        "data.max_length": 64,
        **({"quantization": {"bits": facts.needs_bits}} if facts.needs_bits else {}),
    }


@pytest.mark.parametrize("method", METHOD_FACTS)
def test_it_goes_from_rows_to_a_measured_adapter(method: str, recipe: WriteRecipe, lora: Lora):
    facts = METHOD_FACTS[method]
    recipe(changes_for(method))
    checked = lora("check", "recipe.yaml", "--rows", "0")
    assert checked.code == 0, checked.err
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert "verified: the adapter on disk" in done.err
    assert "Warning" not in checked.err + done.err
    # What check counted on the meta device is what was trained. EVA's ranks are known once rows were seen.
    counts = [re.search(r"([\d,]+) (?:trainable|parameters)", text) for text in (checked.out, done.err)]
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

    # A run that stopped after its second step ends as this one did.
    shutil.rmtree("runs/a/checkpoints/step-00000004")
    finished = Path("runs/a/adapter/adapter_model.safetensors").read_bytes()
    again = lora("train", "recipe.yaml", "--resume")
    assert again.code == 0, again.err
    assert "resuming after step 2" in again.err
    assert Path("runs/a/adapter/adapter_model.safetensors").read_bytes() == finished


def test_adalora_ends_at_its_final_rank(recipe: WriteRecipe, lora: Lora):
    steps = {"max_steps": 30, "save_every": 10, "keep_checkpoints": 3, "eval_every": None, "learning_rate": 1e-2}
    recipe({**changes_for("adalora"), "training": steps})
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    kept = [sum(pattern) for pattern in config["rank_pattern"].values()]
    assert len(kept) == 14
    assert sum(kept) == 2 * 14
    assert min(kept) < max(kept) <= 4, "ranks go to the layers that need them"
    finished = Path("runs/a/adapter/adapter_model.safetensors").read_bytes()
    for step in (20, 30):  # what is left was saved while the rank was falling
        shutil.rmtree(f"runs/a/checkpoints/step-{step:08d}")
    again = lora("train", "recipe.yaml", "--resume")
    assert again.code == 0, again.err
    assert Path("runs/a/adapter/adapter_model.safetensors").read_bytes() == finished


@pytest.mark.parametrize("base", [{"model.dtype": "bfloat16"}, {"quantization": {"bits": 4}}], ids=str)
def test_adalora_is_saved_as_trained_whatever_the_base_is_in(base: dict[str, Any], recipe: WriteRecipe, lora: Lora):
    """PEFT makes the tensors of what is left in the dtype of the base."""
    steps = {"max_steps": 12, "eval_every": None, "learning_rate": 1e-2}
    recipe({**changes_for("adalora"), "training": steps, **base})
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    tensors = load_file("runs/a/adapter/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(len(t) for name, t in tensors.items() if "lora_A" in name) < 4 * 14, "ranks were dropped"
    exact = [t.to(torch.bfloat16).float().equal(t) for name, t in tensors.items() if "lora_A" in name and t.numel()]
    assert not any(exact)


@pytest.mark.parametrize("method", ["vera", "oft", "ia3"])
def test_no_adapter_goes_into_a_module_that_is_trained_whole(method: str, recipe: WriteRecipe, lora: Lora):
    changes = changes_for(method)
    changes["adapter"] = {**changes["adapter"], "modules_to_save": ["mlp"]}
    if method == "ia3":
        changes["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    recipe(changes)
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    names = load_file("runs/a/adapter/adapter_model.safetensors")
    inside = {name.partition(".mlp.")[2] for name in names if ".mlp." in name}
    assert inside == {"down_proj.weight", "gate_proj.weight", "up_proj.weight"}
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert merged.code == 0, merged.err


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("optimizer", ["adamw-8bit", "auto"])
def test_a_quantised_base_with_other_optimizers(bits: int, optimizer: str, recipe: WriteRecipe, lora: Lora):
    recipe({"quantization": {"bits": bits}, "training.optimizer": optimizer})
    checked = lora("check", "recipe.yaml")
    assert checked.code == 0, checked.err
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    for text in (checked.out, done.err):
        assert ("optimizer: adamw (auto)" in text) is (optimizer == "auto")
    held = "4-bit nf4, double quantization, computed in bfloat16" if bits == 4 else "int8 (LLM.int8)"
    assert f"its linear layers: {held}" in done.err
    each = re.search(r"([\d,]+) weights in \d+ MiB: (0\.\d+) bytes each", done.err)
    assert (each is not None) is (bits == 4)
    assert each is None or 0.5 < float(each[2]) < 1  # of layers so small, tables are a good part
    assert "its linear layers: " + held in checked.out


@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw-8bit"])
@pytest.mark.parametrize("command", ["check", "train"])
def test_paging_where_there_is_nothing_to_page_to(name: str, command: str, recipe: WriteRecipe, lora: Lora):
    recipe({"training.optimizer": name})
    done = lora(command, "recipe.yaml")
    assert done.code == 2
    assert done.last_two == [
        f"error: training.optimizer: {name} pages between a CUDA GPU and the host, but this run is on the cpu",
        f"hint: write {name.removeprefix('paged-')}, or auto",
    ]
