"""Shell scripts: the command that trains, the config that it names, and what only the shell knows."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Unreadable
from lora_cli.convert.convert_config import Conversion
from lora_cli.convert.draft import Outcome
from lora_cli.convert.shell_words import commands
from lora_cli.errors import LoraError
from tests.convert.test_scripts_and_commands import read, recipe_of

TRL = "trl sft --model_name_or_path a/b --dataset_name a/r --use_peft"
AXOLOTL = "base_model: a/b\nadapter: lora\nlearning_rate: 1e-4\nlora_r: 4\ndatasets: [{path: r, type: chat_template}]\n"
FACTORY = "model_name_or_path: a/b\nfinetuning_type: lora\ndataset: r\ndataset_dir: ONLINE\nlearning_rate: 1e-4\n"
TUNE = """\
model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj], lora_rank: 4}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/b}
dataset: {_component_: torchtune.datasets.alpaca_dataset}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-4}
"""


def outcomes(result: Conversion) -> dict[str, Outcome]:
    return {line.key: line.outcome for line in result.lines}


@pytest.mark.parametrize(
    ("config", "command", "expected"),
    [
        (AXOLOTL, "accelerate launch -m axolotl.cli.train c.yml --lora_r 8 --learning-rate=2e-4", (8, 2e-4)),
        (AXOLOTL, "axolotl train c.yml --lora-r 8 --learning-rate 2e-4 --launcher accelerate -- --x 1", (8, 2e-4)),
        (AXOLOTL, "axolotl train c.yml", (4, 1e-4)),
        (FACTORY, "llamafactory-cli train c.yml lora_rank=8 learning_rate=2e-4", (8, 2e-4)),
        (f"{TRL.partition(' --')[0]}: 1\n", TRL, None),
        ("model_name_or_path: a/b\ndataset_name: a/r\nlora_r: 4\n",
         "trl sft --config c.yml --use_peft --lora_r 8 --learning_rate 2e-4", (8, 2e-4)),
        (TUNE, "tune run --nproc_per_node 2 lora_distributed --config c.yml model.lora_rank=8 optimizer.lr=2e-4",
         (8, 2e-4)),
        ("lora_parameters: {rank: 4, scale: 1.0}\nlearning_rate: 1e-4\n",
         "mlx_lm.lora -c c.yml --model a/b --data rows --num-layers -1 --learning-rate 2e-4", (4, 2e-4)),
        ("lora_r: 4\ntrain: {max_seq_length: 64}\n",
         "litgpt finetune_lora checkpoints/a/b --config c.yml --lora_r 8 --optimizer AdamW --optimizer.lr 2e-4",
         (8, 2e-4)),
    ],
)  # fmt: skip
def test_the_config_of_a_command_is_read_below_its_options(
    tmp_path: Path, config: str, command: str, expected: tuple[int, float] | None
):
    (tmp_path / "c.yml").write_text(config)
    recipe = recipe_of(read(tmp_path, "run.sh", command))
    if expected is not None:
        assert (recipe.adapter.rank, recipe.training.learning_rate) == expected
    if "nproc" in command:
        assert recipe.distributed.processes == 2


def test_values_that_are_not_used_are_in_the_report(tmp_path: Path):
    (tmp_path / "c.yml").write_text(AXOLOTL)
    result = read(tmp_path, "run.sh", "axolotl train c.yml --lora-r 8 --lora-r 16 --learning-rate 1e-4")
    assert recipe_of(result).adapter.rank == 16
    unused = {line.key: line.value for line in result.lines if line.outcome == Outcome.NO_EFFECT}
    assert unused == {"lora_r, given before": 8, "c.yml: lora_r": 4}


@pytest.mark.parametrize("named", ["none.yml", "llama3/8B_lora", "https://host/c.yaml"])
def test_a_config_that_is_not_here_is_an_error(tmp_path: Path, named: str):
    with pytest.raises(LoraError, match=r"run\.sh:2: .*is not here"):
        read(tmp_path, "run.sh", f"# train\n{TRL} --config {named}")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("{} rows.jsonl", "use_peft"),
        ("trl sft extra --model_name_or_path a/b --dataset_name a/r --use_peft", "arguments"),
        ("{}\n{}", "further runs.line 2"),
        ("{} && {}", "further runs.line 1"),
        ("{} --learning_rate $RATE", "learning_rate"),
        ("{} --learning_rate ${{RATE}}", "learning_rate"),
        ("{} --learning_rate `rate -x`", "learning_rate"),
        ("{} --learning_rate $(rate --of x)", "learning_rate"),
        ("for RATE in 1e-4 2e-4; do {} --learning_rate $RATE; done", "learning_rate"),
        ("{} --dataset_config $1", "dataset_config"),
        ('{} "$@"', "arguments"),
        ("{} $MORE", "use_peft"),
    ],
)
def test_words_and_values_that_only_the_shell_knows(tmp_path: Path, command: str, key: str):
    filled = command.format(TRL, TRL)
    try:
        result = read(tmp_path, "run.sh", filled)
    except LoraError as error:  # a value that is no boolean
        assert key in str(error)  # noqa: PT017
        return
    assert key in result.to_accept()


@pytest.mark.parametrize(
    "command",
    [
        f"{TRL} > log.txt 2>&1 &",
        f"{TRL} 2>&1 | tee log.txt",
        f"nohup {TRL} >> log.txt &",
        f"RATE=1e-4\n{TRL} --learning_rate $RATE",
        f"RATE=${{RATE:-1e-4}}\n{TRL} --learning_rate ${{RATE}}",
        f"{TRL} --learning_rate ${{RATE:-1e-4}}",
        f"OPTIONS='--learning_rate 1e-4'\n{TRL} $OPTIONS",
        f'OPTIONS=(\n  --learning_rate 1e-4  # high\n  # --lora_r 2\n)\n{TRL} "${{OPTIONS[@]}}"',
        f"OPTIONS=(--learning_rate)\nOPTIONS+=(1e-4)\n{TRL} ${{OPTIONS[@]}}",
        f"if true; then {TRL} --no_remove_unused_columns; fi",
    ],
)
def test_what_the_shell_does(tmp_path: Path, command: str):
    result = read(tmp_path, "run.sh", command)
    recipe = recipe_of(result)
    assert recipe.training.learning_rate == (1e-4 if "1e-4" in command else 2e-5)
    assert {"arguments", "use_peft"} & set(outcomes(result)) == {"use_peft"}


def test_other_commands_have_no_effect(tmp_path: Path):
    text = (
        f"pip install -U trl --quiet\nhf download a/b --local-dir b --repo-type model\n{TRL}\nmlx_lm.fuse --m a --n b\n"
    )
    result = read(tmp_path, "run.sh", text)
    recipe_of(result)
    assert {key for key in outcomes(result) if key.startswith("other")} == {
        "other commands.line 1", "other commands.line 2", "other commands.line 4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--lora_target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lr_scheduler_kwargs '{\"num_cycles\": 2}'", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("--lora_target_modules=[q_proj,v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--seed -1", "seed", -1),
        ("--run_name x=y", "run_name", "x=y"),
        ("--eos_token '<|im_end|>'", "eos_token", "<|im_end|>"),
        ('--run_name "a > b; c & d | e"', "run_name", "a > b; c & d | e"),
        ("--no_remove_unused_columns", "remove_unused_columns", False),
    ],
)
def test_values_of_options(tmp_path: Path, option: str, key: str, value: Any):
    assert read(tmp_path, "run.sh", f"{TRL} {option}").draft.config.get(key) == value


def test_places_are_lines_of_the_script(tmp_path: Path):
    result = read(tmp_path, "run.sh", f"A=1 \\\n  B=2\n\n{TRL} \\\n  --lora_typo 3\n")
    assert result.draft.config.places["lora_typo"].endswith("run.sh:4")


def test_words_that_only_the_shell_knows_are_marked():
    (command,) = commands(Path("x.sh"), "train.py $A '${B}' \"x$(c d)y\" plain '' $")
    assert [type(word) for word in command.words[1:]] == [Unreadable, Unreadable, Unreadable, str, str, str]
    assert command.words[3] == "x$(c d)y"


def test_machines_are_told(tmp_path: Path):
    result = read(tmp_path, "run.sh", f"torchrun --nnodes 2 --nproc_per_node 4 train.py {TRL.removeprefix('trl sft ')}")
    assert recipe_of(result).distributed.processes == 4
    (line,) = [line for line in result.lines if line.key == "launcher.nnodes"]
    assert "rows per step count all of them" in line.reason
