"""Notebooks: their calls, and the lines and cells for the shell, are read as those of scripts; what is not, is told."""

import json
from pathlib import Path

import pytest

from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.detect import detect_tool
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.errors import LoraError
from lora_cli.recipe.load import parse_recipe
from lora_cli.recipe.schema import Recipe
from tests.convert.test_scripts_and_commands import UNSLOTH

OPTIONS = "--model_name_or_path a/b --dataset_name a/rows --use_peft --learning_rate 1e-4 --lora_r 4"
AXOLOTL = "base_model: a/b\nadapter: lora\nlora_r: 4\nlearning_rate: 1e-4\ndatasets: [{path: a/r, type: alpaca}]\n"


def read(folder: Path, *cells: str) -> Conversion:
    file = folder / "a.ipynb"
    content = [{"cell_type": "markdown", "source": ["!trl sft"]}]
    content += [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    file.write_text(json.dumps({"cells": content}))
    config = read_config(file)
    return convert_config(config, detect_tool(config).name)


def recipe_of(result: Conversion) -> Recipe:
    assert result.to_accept() == []
    assert result.of(Outcome.OTHER_TASK) == []
    return parse_recipe(result.text, Path("r.yaml"))


def unread(result: Conversion) -> str:
    return "".join(str(line.value) for line in result.lines if line.key == "unread cells")


@pytest.mark.parametrize(
    ("cells", "left"),
    [
        ([f"!trl sft {OPTIONS}"], ""),
        ([f"!accelerate launch --num_processes 1 sft.py {OPTIONS}"], ""),
        ([f"!CUDA_VISIBLE_DEVICES=0 python sft.py \\\n  {OPTIONS}"], ""),
        ([f"!cd trl && trl sft {OPTIONS}"], ""),
        ([f"%%bash\nset -e\ntrl sft {OPTIONS}"], "set -e"),
        ([f"%%script bash\ntrl sft \\\n {OPTIONS}"], ""),
        ([f"if True:\n    !trl sft {OPTIONS}"], "the Python of the other cells"),
        (["!pip install trl", f"!trl sft {OPTIONS}", "%cd x\n!nvidia-smi"], "%cd x; pip install trl; nvidia-smi"),
        ([f"out = !trl sft {OPTIONS}"], "the Python of the other cells"),
        ([f"%system trl sft {OPTIONS}"], ""),
        (["rate = 1e-4", f"!trl sft {OPTIONS}".replace("1e-4", "{rate}")], "the Python of the other cells"),
        (["rate = 1e-4", f"!trl sft {OPTIONS}".replace("1e-4", "$rate")], "the Python of the other cells"),
        (["x = 1", "%%html\n<b>", f"!trl sft {OPTIONS}"], "%%html; the Python of the other cells"),
        (["def f(:", f"!trl sft {OPTIONS}"], "the Python of the other cells"),
        (
            [f"!trl sft {OPTIONS}", "m = AutoModelForCausalLM.from_pretrained('out')\nm.generate()"],
            "the Python of the other cells",
        ),
    ],
)
def test_commands_of_a_notebook(cells: list[str], left: str, tmp_path: Path):
    result = read(tmp_path, *cells)
    recipe = recipe_of(result)
    assert (recipe.model.path, recipe.training.learning_rate, recipe.adapter.rank) == ("a/b", 1e-4, 4)
    assert unread(result) == left


def test_a_config_that_a_cell_writes(tmp_path: Path):
    result = read(tmp_path, f"%%writefile conf/a.yml\n{AXOLOTL}", "!axolotl train conf/a.yml --learning-rate 2e-4")
    assert recipe_of(result).training.learning_rate == 2e-4
    assert "a.yml: learning_rate" in {line.key for line in result.lines}
    with pytest.raises(LoraError, match=r"b\.yml, which the command names, is not here"):
        read(tmp_path, f"%%writefile conf/a.yml\n{AXOLOTL}", "!axolotl train b.yml")
    (tmp_path / "b.yml").write_text(AXOLOTL)
    assert recipe_of(read(tmp_path, "!axolotl train b.yml")).training.learning_rate == 1e-4


@pytest.mark.parametrize("rate", ["{cfg.rate}", "{2 * rate}", "{unknown}", "$unknown", "$(rate)"])
def test_values_that_only_the_notebook_knows(rate: str, tmp_path: Path):
    result = read(tmp_path, f"!trl sft {OPTIONS}".replace("1e-4", f'"{rate}"'))
    assert result.to_accept() == ["learning_rate"]


def test_braces_that_are_no_names(tmp_path: Path):
    result = read(tmp_path, f"!trl sft {OPTIONS} --lr_scheduler_kwargs '{{{{\"min_lr\": 1e-5}}}}'")
    (line,) = [line for line in result.lines if line.key.startswith("lr_scheduler_kwargs")]
    assert line.value in (1e-5, {"min_lr": 1e-5})
    with pytest.raises(LoraError, match="is not a number"):  # the shell leaves braces as they are
        read(tmp_path, "rate = 1e-4", f"%%bash\ntrl sft {OPTIONS.replace('1e-4', '{rate}')}")


def test_calls_and_commands_that_both_train(tmp_path: Path):
    result = read(tmp_path, UNSLOTH, f"!trl sft {OPTIONS}", "!pip install unsloth")
    assert result.to_accept() == ["further runs.line 7"]
    assert result.draft.tool == "unsloth"
    assert unread(result) == "pip install unsloth"
    assert unread(read(tmp_path, "!pip install unsloth", UNSLOTH)) == "pip install unsloth"


def test_two_commands_that_train(tmp_path: Path):
    result = read(tmp_path, f"!trl sft {OPTIONS}", f"!trl sft {OPTIONS} --seed 2")
    assert result.to_accept() == ["further runs.line 2"]


def test_a_notebook_in_which_nothing_trains(tmp_path: Path):
    with pytest.raises(LoraError, match="has none of the calls"):
        read(tmp_path, "x = 1", "!pip install --upgrade --quiet trl")
