"""`lora convert`: the report, what is written, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import CommandResult, Lora
from tests.convert.examples import FOLDER

AXOLOTL = """\
base_model: Qwen/Qwen3-0.6B
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sequence_len: 512
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
"""
LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen3-0.6B
stage: sft
finetuning_type: lora
dataset: mine
template: qwen3
cutoff_len: 512
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def outcomes(result: CommandResult) -> dict[str, str]:
    return {each["key"]: each["outcome"] for each in json.loads(result.out)["keys"]}


def test_the_recipe_is_written_and_can_be_checked(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL), "--out", "recipe.yaml")
    assert result.code == 0, result.err
    assert "a config of axolotl (sure: only it has" in result.out
    assert "lora_r -> adapter.rank: 8" in result.out or "lora_r: 8 -> adapter.rank: 8" in result.out
    assert "adapter.dropout: 0 — axolotl's default" in result.out
    assert "recipe.yaml is written; next: lora check recipe.yaml" in result.err
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert recipe["training"]["batch_size"] == 2
    assert recipe["data"]["overlong"] == "drop"
    assert lora("check", "recipe.yaml", "--no-model").code == 0


def test_without_out_the_recipe_is_printed(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL))
    assert result.code == 0
    assert yaml.safe_load(result.out)["model"]["path"] == "Qwen/Qwen3-0.6B"
    assert "12 keys: " in result.err


def test_a_dash_is_stdout(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL), "--out", "-")
    assert result.code == 0, result.err
    assert yaml.safe_load(result.out)["model"]["path"] == "Qwen/Qwen3-0.6B"
    assert not Path("-").exists()


def test_the_name_of_the_config_is_no_part_of_the_recipe(lora: Lora):
    result = lora("convert", write("a\x1b[1m\noutput: mine\n.yml", AXOLOTL), "--out", "recipe.yaml")
    assert result.code == 0, result.err
    assert yaml.safe_load(Path("recipe.yaml").read_text()).get("output") != "mine"
    assert result.out.splitlines()[0].startswith(r"a\x1b[1m\noutput: mine\n.yml: a config of axolotl")


def test_an_existing_file_is_not_replaced(lora: Lora):
    write("recipe.yaml", "mine")
    result = lora("convert", write("a.yml", AXOLOTL), "--out", "recipe.yaml")
    assert result.code == 2
    assert "--out recipe.yaml exists" in result.err
    assert Path("recipe.yaml").read_text() == "mine"


def test_a_key_that_is_not_offered_stops_it_until_it_is_accepted(lora: Lora):
    file = write("a.yml", AXOLOTL + "relora_steps: 150\n")
    result = lora("convert", file, "--out", "recipe.yaml")
    assert result.code == 2
    assert not Path("recipe.yaml").exists()
    assert "relora_steps: 150 — ReLoRA restarts the adapter; accepted: one adapter" in result.out
    assert "--accept relora_steps" in result.last_two[1]
    accepted = lora("convert", file, "--out", "recipe.yaml", "--accept", "relora_steps")
    assert accepted.code == 0
    assert "(accepted)" in accepted.out
    assert Path("recipe.yaml").exists()


def test_an_unknown_key_stops_it_with_a_suggestion(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL + "warmup_step: 10\n"), "--out", "recipe.yaml")
    assert result.code == 2
    assert "a.yml:14: warmup_step: 10 — unknown key of axolotl; did you mean warmup_steps?" in result.out
    assert lora("convert", "a.yml", "--out", "recipe.yaml", "--accept", "warmup_step").code == 0


def test_accepting_a_key_that_needs_no_acceptance(lora: Lora):
    file = write("a.yml", AXOLOTL + "relora_steps: 150\n")
    result = lora("convert", file, "--accept", "relora_step")
    assert result.code == 2
    assert "did you mean relora_steps?" in result.err
    assert "remove it" in lora("convert", write("b.yml", AXOLOTL), "--accept", "lora_r").err


def test_another_task_cannot_be_accepted(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL + "rl: dpo\n"), "--out", "recipe.yaml")
    assert result.code == 2
    assert "rl: dpo is another task" in result.err
    assert "--accept" not in result.last_two[1]
    assert "needs no acceptance" in lora("convert", "a.yml", "--accept", "rl").err


def test_values_that_ask_for_nothing(lora: Lora):
    text = AXOLOTL + "load_in_8bit: false\nload_in_4bit: false\nrl:\nrelora:\ns2_attention: false\n"
    result = lora("convert", write("a.yml", text), "--json")
    assert result.code == 0
    found = outcomes(result)
    assert {found[key] for key in ("load_in_8bit", "load_in_4bit", "rl", "relora", "s2_attention")} == {"default"}
    assert "quantization" not in json.loads(result.out)["recipe"]


def test_full_fine_tuning_is_another_task(lora: Lora):
    assert "every weight is trained" in lora("convert", write("a.yml", AXOLOTL.replace("adapter: lora\n", ""))).err
    trl = "model_name_or_path: a/b\ndataset_name: c/d\nmax_length: 512\n"
    assert "use_peft" in lora("convert", write("t.yaml", trl)).err
    full = LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full")
    assert "only adapters are trained here" in lora("convert", write("l.yaml", full)).err


def test_a_missing_dataset_info_is_named(lora: Lora):
    result = lora("convert", write("l.yaml", LLAMA_FACTORY))
    assert result.code == 2
    assert "data/dataset_info.json was not found, in which it looks up mine" in result.out


def test_dataset_info_gives_format_columns_and_roles(lora: Lora):
    entry = {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "num_samples": 50,
        "columns": {"messages": "dialog", "system": "sys"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "narrator", "assistant_tag": "gpt"},
    }
    write("data/dataset_info.json", json.dumps({"mine": entry}))
    assert lora("convert", write("l.yaml", LLAMA_FACTORY), "--out", "r.yaml").code == 0
    (source,) = yaml.safe_load(Path("r.yaml").read_text())["data"]["train"]
    assert source == {
        "path": "data/mine.json",
        "format": "sharegpt",
        "max_rows": 50,
        "columns": {"conversations": "dialog", "system": "sys", "tools": None},
        "message_fields": {"role": "who", "content": "says"},
        "roles": {"narrator": "user"},
    }


def test_unknown_keys_of_dataset_info(lora: Lora):
    write("data/dataset_info.json", json.dumps({"mine": {"file_name": "mine.json", "formating": "alpaca"}}))
    result = lora("convert", write("l.yaml", LLAMA_FACTORY))
    assert result.code == 2
    assert "dataset_info.json[mine].formating" in result.err
    typo = lora("convert", write("l.yaml", LLAMA_FACTORY.replace("dataset: mine", "dataset: mind")))
    assert "did you mean mine?" in typo.out


def test_packing_that_leaks_is_said_to_be_done_without(lora: Lora):
    write("data/dataset_info.json", json.dumps({"mine": {"file_name": "mine.json"}}))
    plain = lora("convert", write("l.yaml", LLAMA_FACTORY + "packing: true\n"), "--out", "a.yaml")
    assert "packing: true -> data.packing: true — without attention between packed rows, unlike there" in plain.out
    neat = lora("convert", write("n.yaml", LLAMA_FACTORY + "neat_packing: true\n"), "--out", "b.yaml")
    assert "unlike there" not in neat.out
    axolotl = lora("convert", write("a.yml", AXOLOTL + "sample_packing: true\n"), "--out", "c.yaml")
    assert "without attention between packed rows" in axolotl.out


def test_the_tool_has_to_be_said_where_keys_fit_several(lora: Lora):
    file = write("x.yaml", "learning_rate: 1e-4\nseed: 1\n")
    result = lora("convert", file)
    assert result.code == 2
    assert "write --from with one of axolotl, llama-factory, trl" in result.err
    assert "no tool is known by its keys" in result.err
    assert "--from xtuner is not known" in lora("convert", file, "--from", "xtuner").err


def test_our_own_recipe_is_recognized(lora: Lora):
    result = lora("convert", write("r.yaml", "model: {path: a}\ndata: {train: rows.jsonl}\n"))
    assert result.code == 2
    assert "is a recipe of this tool already" in result.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yml", "", "has no keys"),
        ("a.yml", "- 1\n- 2\n", "has no keys"),
        ("a.yml", "a: [1\n", "a `[` is not closed"),
        ("a.yml", "a: 1\na: 2\n", "duplicate key"),
        ("a.py", "def f(:\n", "a.py:1: is not Python that can be read"),
        ("a.py", "print(1)\n", "has none of the calls"),
        ("a.ipynb", "{}", "is not a notebook"),
        ("a.sh", "echo hello\n", "no command in it has options"),
        ("a.yml", AXOLOTL.replace("lora_r: 8", "lora_r: eight"), "a.yml:6: lora_r: eight is not a number"),
        ("a.yml", AXOLOTL.replace("lora_r: 8", "lora_r: 1e400"), "lora_r: inf is not a number"),
        ("a.yml", AXOLOTL.replace("lora_r: 8", "lora_r: -8"), "adapter.rank: -8 is too small"),
        (
            "a.yml",
            AXOLOTL.replace("    type: chat", "    weight: much\n    type: chat"),
            "weight: much is not a number",
        ),
        ("a.yml", AXOLOTL.replace("sequence_len: 512", "sequence_len: 0.5"), "sequence_len: 0.5 is not an integer"),
    ],
)
def test_files_that_cannot_be_converted(lora: Lora, name: str, text: str, message: str):
    result = lora("convert", write(name, text))
    assert result.code == 2
    assert message in result.err


def test_a_missing_file(lora: Lora):
    result = lora("convert", "nothing.yaml")
    assert result.code == 2
    assert "nothing.yaml" in result.err


def test_json_has_every_key(lora: Lora):
    result = lora("convert", write("a.yml", AXOLOTL + "wandb_project: p\n"), "--json", "--out", "recipe.yaml")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["tool"] == "axolotl"
    found = outcomes(result)
    assert len(found) == 13
    assert found["wandb_project"] == "carried"
    assert "tracking" in next(each["to"] for each in report["keys"] if each["key"] == "wandb_project")
    assert report["out"] == "recipe.yaml"
    assert report["recipe"] == Path("recipe.yaml").read_text()


def test_a_script_is_read_and_not_run(lora: Lora):
    text = (FOLDER / "unsloth" / "llama-3-2-3b-conversational.py").read_text()
    file = write("train.py", "open('touched', 'w')\n" + text)
    result = lora("convert", file, "--out", "recipe.yaml")
    assert result.code == 0, result.out
    assert not Path("touched").exists()
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert recipe["data"]["train"] == "mlabonne/FineTome-100k"
    assert recipe["quantization"]["bits"] == 4
    assert recipe["training"]["seed"] == 3407
    assert "loss_on" not in recipe["data"]


def test_expressions_of_a_script_are_not_guessed(lora: Lora):
    text = (FOLDER / "unsloth" / "llama-3-2-3b-conversational.py").read_text()
    file = write(
        "train.py", text.replace("r=16", "r=int(os.environ['R'])").replace("learning_rate=2e-4", "learning_rate=lr")
    )
    result = lora("convert", file)
    assert result.code == 2
    assert "get_peft_model.r: `int(os.environ['R'])` — is computed by the script" in result.out
    assert "SFTConfig.learning_rate" in result.err


def test_a_notebook_is_read_like_a_script(lora: Lora):
    text = (FOLDER / "unsloth" / "llama-3-2-3b-conversational.py").read_text()
    cells = [
        {"cell_type": "markdown", "source": ["# hi"]},
        {"cell_type": "code", "source": ["!pip install unsloth\n", text]},
    ]
    assert lora("convert", write("a.ipynb", json.dumps({"cells": cells})), "--out", "recipe.yaml").code == 0


def test_the_last_layers_of_mlx_are_counted_in_the_base(lora: Lora):
    text = "model: ./base\nfine_tune_type: lora\nnum_layers: 4\ndata: ./rows\niters: 100\n"
    result = lora("convert", write("m.yaml", text))
    assert result.code == 2
    assert "the last 4 layers" in result.out
    write("base/config.json", json.dumps({"num_hidden_layers": 6}))
    assert lora("convert", "m.yaml", "--out", "recipe.yaml").code == 0
    assert yaml.safe_load(Path("recipe.yaml").read_text())["adapter"]["layers"] == [2, 3, 4, 5]


@pytest.mark.slow
def test_the_converted_recipe_trains_in_as_many_steps(lora: Lora, workdir: Path):
    """24 rows, of which none is held out, in steps of 2 × 2 rows: 6 steps an epoch."""
    text = AXOLOTL.replace("Qwen/Qwen3-0.6B", "./base").replace("sequence_len: 512", "sequence_len: 128")
    text = text.replace("gradient_accumulation_steps: 4", "gradient_accumulation_steps: 2").replace(
        "num_epochs: 3", "num_epochs: 1"
    )
    assert lora("convert", write("a.yml", text + "output_dir: runs/moved\n"), "--out", "moved.yaml").code == 0
    result = lora("train", "moved.yaml")
    assert result.code == 0, result.err
    metrics = [json.loads(line) for line in Path("runs/moved/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics if "step" in line) == 6


@pytest.mark.slow
def test_no_heavy_library_is_imported(tmp_path: Path):
    write("a.yml", AXOLOTL)
    code = (
        "import sys; sys.argv = ['lora', 'convert', 'a.yml', '--out', 'r.yaml']\n"
        "from lora_cli import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pyarrow'} & sys.modules.keys(), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.splitlines()[-1] == "set()", done.stderr
