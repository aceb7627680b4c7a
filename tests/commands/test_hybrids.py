"""`lora check` and `lora train` on a base whose layers carry state along the sequence."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.commands.conftest import Lora, WriteRecipe
from tests.model import families
from tests.model.families import FAMILIES

OFF = (
    "packing: off, because rows would not stay separate in lfm2: its conv layers carry state from one row into "
    "the next; the kernels that keep rows apart run on a GPU"
)


@pytest.fixture
def hybrid(workdir: Path) -> str:
    """A base with a convolution and an attention layer, and the tokenizer of the tiny base."""
    tokenizer = AutoTokenizer.from_pretrained("base")
    family = FAMILIES["lfm2"]
    families.write(family._replace(options={**family.options, "vocab_size": len(tokenizer)}), Path("hybrid"))
    tokenizer.save_pretrained("hybrid")
    return "hybrid"


@pytest.mark.slow
def test_packing_is_off_by_default_and_told_before_the_load(recipe: WriteRecipe, lora: Lora, hybrid: str):
    path = recipe({"model.path": hybrid})
    checked = lora("check", path)
    assert (checked.code, checked.err.count(OFF)) == (0, 1), checked.err
    trained = lora("train", path)
    assert (trained.code, trained.err.count(OFF)) == (0, 1), trained.err
    assert "[transformers]" not in trained.err  # its advice to install kernels for GPUs
    written = yaml.safe_load(Path("runs/a/recipe.yaml").read_text())
    assert written["data"]["packing"] is False
    assert (written["training"]["batch_size"], written["training"]["tokens_per_batch"]) == (4, None)
    assert lora("eval", "runs/a").code == 0


@pytest.mark.parametrize("command", ["check", "train"])
def test_packing_that_is_asked_for_and_impossible_is_an_error_before_the_load(
    command: str, recipe: WriteRecipe, lora: Lora, hybrid: str
):
    failed = lora(command, recipe({"model.path": hybrid, "data.packing": True}))
    assert failed.code == 2
    assert failed.last_two == [
        OFF.replace("packing: off, because", "error: data.packing:"),
        "hint: set data.packing: false, or remove it",
    ]
    assert "rows read" not in failed.out + failed.err
