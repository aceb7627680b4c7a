"""Scripts and command lines: what code does with rows, model and loss, and which task a command is for."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.detect import detect_tool
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.recipe.load import parse_recipe
from lora_cli.recipe.schema import Recipe

SCRIPT = """\
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained("a/b")
tokenizer = AutoTokenizer.from_pretrained("a/b")
ds = load_dataset("a/rows", split="train")
peft_config = LoraConfig(r=8)
args = SFTConfig(output_dir="out", max_length=512)
# more
trainer = SFTTrainer(model=model, args=args, train_dataset=ds, peft_config=peft_config)
"""
UNSLOTH = """\
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("a/b", max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=8)
ds = load_dataset("a/rows", split="train")
trainer = SFTTrainer(model=model, train_dataset=ds, args=SFTConfig(output_dir="out"))
"""


def read(folder: Path, name: str, text: str) -> Conversion:
    file = folder / name
    file.write_text(text)
    config = read_config(file)
    return convert_config(config, detect_tool(config).name)


def script(folder: Path, more: str = "") -> Conversion:
    return read(folder, "train.py", SCRIPT.replace("# more", more))


def recipe_of(conversion: Conversion) -> Recipe:
    assert conversion.to_accept() == []
    assert conversion.of(Outcome.OTHER_TASK) == []
    return parse_recipe(conversion.text, Path("r.yaml"))


def rows(recipe: Recipe) -> dict[str, Any]:
    assert not isinstance(recipe.data.train, str)
    return recipe.data.train[0].model_dump(exclude_defaults=True)


def test_selected_rows_are_in_the_recipe(tmp_path: Path):
    result = script(tmp_path, "ds = ds.shuffle(seed=1).select(range(1000))")
    assert rows(recipe_of(result)) == {"path": "a/rows", "max_rows": 1000}
    (line,) = [line for line in result.lines if line.key == "dataset.select"]
    assert line.text().endswith("max_rows: 1000 — the first rows, not a random sample")


def test_rows_that_are_selected_twice_or_by_code(tmp_path: Path):
    twice = script(tmp_path, "ds = ds.select(range(1000))\nds = ds.select(range(10))")
    assert twice.to_accept() == ["select, line 8"]
    assert script(tmp_path, "ds = ds.select(chosen)").to_accept() == ["dataset.select"]


@pytest.mark.parametrize(
    "more",
    [
        "few = ds['test'].select(range(9))",
        "few = ds['test'].shuffle()\nfew = few.select(range(9))",
        "trainer = Trainer(model, eval_dataset=ds.select(range(9)))",
    ],
)
def test_rows_selected_for_evaluation_are_not_those_of_training(tmp_path: Path, more: str):
    result = script(tmp_path, f"ds = ds.select(range(100))\n{more}")
    assert any(key.startswith("select, line ") for key in result.to_accept())
    assert "max_rows: 100\n" in result.text
    assert "max_rows" not in script(tmp_path, more).text


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("trl dpo --model_name_or_path a/b --dataset_name a/r --use_peft", "trl dpo"),
        ("accelerate launch --num_processes 2 trl/scripts/grpo.py --model_name_or_path a/b --use_peft", "grpo.py"),
        ("python run_kto.py --model_name_or_path a/b --dataset_name a/r --use_peft", "run_kto.py"),
        ("python -m trl.scripts.rloo --model_name_or_path a/b --dataset_name a/r --use_peft", "trl.scripts.rloo"),
        ("tune run --nproc_per_node 2 lora_dpo_distributed --config llama3_1/8B_lora_dpo", "tune run lora_dpo_distri"),
    ],
)
def test_commands_of_other_tasks(tmp_path: Path, command: str, named: str):
    (first, *_) = read(tmp_path, "run.sh", command).of(Outcome.OTHER_TASK)
    assert first.key == "trainer"
    assert first.reason.startswith(named)


def test_sft_is_the_task_of_a_command(tmp_path: Path):
    result = read(tmp_path, "run.sh", "trl sft --model_name_or_path a/dpo --dataset_name a/dpo-rows --use_peft")
    assert recipe_of(result).model.path == "a/dpo"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 train.py ", "trl"),
        ("WANDB_PROJECT=x trl sft ", "trl"),
        ("export A=1 && env B=2 trl sft ", "trl"),
        ('ARGS="--max_length 64"\nOUT=$(mktemp -d --suffix x --tmpdir y)\ntrl sft $ARGS ', "trl"),
    ],
)
def test_the_environment_before_a_command(tmp_path: Path, text: str, program: str):
    result = read(tmp_path, "run.sh", f"{text} --model_name_or_path a/b --dataset_name a/r --use_peft")
    assert result.draft.config.program == program
    assert recipe_of(result).model.path == "a/b"


def test_environment_and_module_are_no_options(tmp_path: Path):
    command = "WANDB_API_KEY=abc python -m mlx_lm.lora --model a/b --train --data rows --num-layers -1 --iters 10"
    result = read(tmp_path, "run.sh", command)
    assert recipe_of(result).model.path == "a/b"
    (line,) = [line for line in result.lines if line.key == "launcher.WANDB_API_KEY"]
    assert "WANDB_API_KEY: (not shown)" in line.text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r=8", "r=8, task_type='SEQ_CLS'"),
        ("r=8", "r=8, task_type=TaskType.TOKEN_CLS"),
        ("AutoModelForCausalLM", "AutoModelForSequenceClassification"),
        ("AutoModelForCausalLM", "transformers.AutoModelForSeq2SeqLM"),
    ],
)
def test_scripts_of_other_tasks(tmp_path: Path, old: str, new: str):
    assert read(tmp_path, "train.py", SCRIPT.replace(old, new)).of(Outcome.OTHER_TASK)


def test_the_task_type_of_language_models(tmp_path: Path):
    recipe_of(read(tmp_path, "train.py", SCRIPT.replace("r=8", "r=8, task_type=TaskType.CAUSAL_LM")))


@pytest.mark.parametrize(
    ("collator", "loss_on"),
    [
        ("DataCollatorForCompletionOnlyLM('### A:', tokenizer=tokenizer)", "last-turn"),
        ("DataCollatorForCompletionOnlyLM('### A:', instruction_template='### Q:', tokenizer=t)", "assistant"),
        ("DataCollatorForSeq2Seq(tokenizer)", "all"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_the_collator_decides_which_tokens_carry_loss(tmp_path: Path, collator: str, loss_on: str, named: bool):
    text = SCRIPT.replace("# more", f"collate = {collator}" if named else "")
    text = text.replace("args=args", f"args=args, data_collator={'collate' if named else collator}")
    assert recipe_of(read(tmp_path, "train.py", text)).data.loss_on == loss_on


def test_an_unknown_collator(tmp_path: Path):
    text = SCRIPT.replace("args=args", "args=args, data_collator=Mine(tokenizer)")
    assert read(tmp_path, "train.py", text).to_accept() == ["SFTTrainer.data_collator"]
    text = text.replace("Mine", "DataCollatorForCompletionOnlyLM").replace(
        "max_length=512", "max_length=512, dataset_text_field='text'"
    )
    assert read(tmp_path, "train.py", text).to_accept() == ["SFTTrainer.data_collator"]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("model, tokenizer = setup_chat_format(model, tokenizer)", "calls.setup_chat_format"),
        ("model = PeftModel.from_pretrained(model, 'x', is_trainable=True)", "calls.PeftModel"),
        ("tokenizer.add_special_tokens({'additional_special_tokens': ['<x>']})", "calls.add_special_tokens"),
        ("model.resize_token_embeddings(len(tokenizer))", "calls.resize_token_embeddings"),
        ("args.learning_rate = 1e-3", "set.args.learning_rate"),
        ("trainer.args.max_steps = 0", "set.trainer.args.max_steps"),
        ("tokenizer.chat_template = open('x').read()", "set.chat_template"),
    ],
)
def test_calls_that_change_model_or_training(tmp_path: Path, more: str, key: str):
    result = script(tmp_path, more)
    assert result.to_accept() == [key]
    assert result.draft.config.places[key].endswith("train.py:7")


def test_calls_that_change_nothing(tmp_path: Path):
    recipe_of(script(tmp_path, "tokenizer.add_special_tokens({'pad_token': '<pad>'})\nmodel.config.use_cache = False"))
    after = "PeftModel.from_pretrained(model, 'out').merge_and_unload()"
    recipe_of(read(tmp_path, "train.py", SCRIPT + after))
    template = recipe_of(script(tmp_path, "tokenizer.chat_template = '{{ messages }}'")).data.chat_template
    assert template == "{{ messages }}"


def test_defaults_of_unsloth(tmp_path: Path):
    recipe = recipe_of(read(tmp_path, "train.py", UNSLOTH))
    assert recipe.quantization is not None
    assert recipe.quantization.bits == 4
    spec = recipe.training
    assert (spec.batch_size, spec.gradient_accumulation, spec.optimizer) == (4, 2, "adamw-8bit")
    assert (spec.learning_rate, spec.warmup, spec.weight_decay, spec.seed) == (5e-5, 0.1, 0.01, 3407)
    own = UNSLOTH.replace('"out"', '"out", seed=1, weight_decay=0.0, warmup_steps=5')
    spec = recipe_of(read(tmp_path, "train.py", own)).training
    assert (spec.warmup, spec.weight_decay, spec.seed) == (5, 0, 1)


def test_merge_keys_are_resolved(tmp_path: Path):
    text = (
        "base_model: a/b\nadapter: lora\nlearning_rate: 1e-4\nsequence_len: 512\ndatasets:\n"
        "  - &first {path: r.jsonl, type: chat_template, split: test}\n  - {<<: *first, path: s.jsonl}\n"
    )
    recipe = recipe_of(read(tmp_path, "a.yml", text))
    assert isinstance(recipe.data.train, list)
    assert [(source.path, source.split) for source in recipe.data.train] == [("r.jsonl", "test"), ("s.jsonl", "test")]
