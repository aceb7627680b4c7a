"""Configs, scripts and commands that no person wrote: nested, repeated or long without end. One error, in seconds."""

import json
import os
import time
from pathlib import Path

import pytest

from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.detect import detect_tool
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.errors import LoraError
from tests.convert.minimal import MINIMAL

TRAIN = "llamafactory-cli train --finetuning_type lora"


def read(folder: Path, name: str, text: str, tool: str | None = None) -> Conversion:
    (folder / name).write_text(text)
    config = read_config(folder / name)
    return convert_config(config, tool or detect_tool(config).name)


def refused(folder: Path, name: str, text: str, tool: str | None = None) -> str:
    begin = time.perf_counter()
    with pytest.raises(LoraError) as error:
        read(folder, name, text, tool)
    assert time.perf_counter() - begin < 5
    assert error.value.hint
    return error.value.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "a: " + "[" * 50_000),
        ("a.json", '{"a":' * 50_000),
        ("a.yaml", "".join(" " * depth + "a:\n" for depth in range(100))),
        ("a.ipynb", "[" * 50_000),
        ("a.ipynb", '{"cells":' * 50_000),
        *(("a.py", f"SFTConfig(a={value})") for value in (
            "[" * 150 + "]" * 150, "-" * 600 + "1", "x" + ".y" * 700, "f(" * 150 + ")" * 150, "+".join("x" * 800),
            "not " * 500 + "x", "lambda:" * 500 + "x", "x" + "[0]" * 500,
        )),
        ("a.py", "if x:\n pass\nel" * 300 + "se:\n SFTConfig(a=1)"),
        ("a.py", "x = 1\n" * 50_000 + "SFTConfig(a=1)"),
        ("a.py", "".join(f"x{each}=x{each - 1}\n" for each in range(900, 0, -1)) + "x0=load_dataset('x')"),
    ],
)  # fmt: skip
def test_what_is_nested_without_end(name: str, text: str, tmp_path: Path):
    refused(tmp_path, name, text)


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 9000, "(" * 9000])
def test_a_deep_value_of_an_option_is_a_text(value: str, tmp_path: Path):
    result = read(tmp_path, "a.sh", f"{TRAIN} --lora_rank 8 --more '{value}'")
    (line,) = [line for line in result.lines if line.key == "more"]
    assert (line.outcome, line.value) == (Outcome.UNKNOWN, value)
    text = f"use_peft: true\nlr_scheduler_kwargs: {json.dumps(value)}\n"
    assert "is not a section" in refused(tmp_path, "a.yaml", text, "trl")


def test_a_name_with_many_dots_is_one_option(tmp_path: Path):
    name = "a." * 900 + "b"
    assert name in read(tmp_path, "a.sh", f"{TRAIN} --lora_rank 8 --{name} 1").to_accept()


@pytest.mark.parametrize(
    "lines",
    [
        "A=xxxxxxxxxx\n" + "A=$A$A\n" * 60,
        "A=x\n" + "A=${A}${A}${A}\n" * 60,
        "A=" + "x" * 100_000 + "\nB=" + "$A" * 10_000 + "\n",
        "A=(" + "x " * 50_000 + ')\necho "${A[@]}" "${A[@]}" "${A[@]}" "${A[@]}"\n',
    ],
)
def test_variables_that_multiply(lines: str, tmp_path: Path):
    message = refused(tmp_path, "a.sh", f"{lines}{TRAIN} --lora_rank 8 --more $A\n")
    assert "a.sh:" in message
    assert "variables become more than 262,144 characters, and are not read further" in message


@pytest.mark.parametrize("tool", ["llama-factory", "torchtune"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a0: xxxxxxxxxx\n" + "".join(f"a{i}: {f'${{a{i - 1}}}' * 40}\n" for i in range(1, 30)), "become more than"),
        ("a: " + "${a}" * 10_000, "become more than"),
        (f"b: {'x' * 100_000}\na: {'${b}' * 10_000}\n", "become more than"),
        ("a: ${b}y\nb: ${a}x\n", "refer to each other: ${b}y"),
        ("a: ${b}\nb: ${a}\n", "refer to each other: ${b}"),
    ],
)
def test_references_that_multiply_or_go_in_a_circle(tool: str, text: str, problem: str, tmp_path: Path):
    message = refused(tmp_path, "a.yaml", text, tool)
    assert message.startswith(f"{tmp_path / 'a.yaml'}: references ")
    assert problem in message


def test_a_chain_of_references_is_followed(tmp_path: Path):
    chain = "".join(f"k{each}: ${{k{each + 1}}}\n" for each in range(12))
    keys = "".join(f"{key}: {json.dumps(value)}\n" for key, value in MINIMAL["llama-factory"].items())
    result = read(tmp_path, "a.yaml", f"{keys}learning_rate: ${{k0}}\n{chain}k12: 3e-5\n", "llama-factory")
    assert result.draft.values["training.learning_rate"] == 3e-5
    assert result.to_accept() == []


def test_anchors_that_multiply(tmp_path: Path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))
    merged = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))
    for text in (laughs, merged):
        assert "more than 5,000 values, aliases expanded" in refused(tmp_path, "a.yaml", text)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "x/" * 3000 + "x"])
def test_names_that_no_file_system_takes(name: str, tmp_path: Path):
    for command in (f"llamafactory-cli train {name}.yaml --lora_rank 8", f"{TRAIN} --config {name}.yaml"):
        assert "which the command names, is not here" in refused(tmp_path, "a.sh", command)
    keys = {
        "litgpt": {"checkpoint_dir": name}, "llama-factory": {"dataset_dir": name, "dataset": "x"},
        "mlx": {"model": name, "data": name}, "trl": {"chat_template_path": name}, "axolotl": {"base_model": name},
    }  # fmt: skip
    for tool, changes in keys.items():
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**MINIMAL[tool], **changes}.items())
        assert read(tmp_path, "a.yaml", text, tool).lines


@pytest.mark.parametrize(
    ("text", "most"),
    [
        (f"{TRAIN} " + "".join(f"--a{each} {each} " for each in range(20_000)), "a command with 20,"),
        (f"{TRAIN} --lora_rank 8 --a {'1 ' * 200_000}", ""),
        (f"{TRAIN} --lora_rank 8 --b 1 ; " * 10_000, "10,000 commands with options"),
        (f"{TRAIN} --lora_rank 8 --b 1 ; " * 1000, ""),
    ],
)
def test_commands_with_very_many_words(text: str, most: str, tmp_path: Path):
    if most:
        assert most in refused(tmp_path, "a.sh", text)
        return
    begin = time.perf_counter()
    assert read(tmp_path, "a.sh", text).lines
    assert time.perf_counter() - begin < 10


def test_options_that_are_named_like_what_is_kept_beside_them(tmp_path: Path):
    result = read(
        tmp_path, "a.sh", "accelerate launch --num_processes 2 sft.py --use_peft --launcher 1 --lora_r 8", "trl"
    )
    lines = {line.key: line.value for line in result.lines}
    assert (lines["launcher.launcher"], lines["launcher.num_processes"]) == (1, 2)
    assert "launcher.program" in {
        line.key for line in read(tmp_path, "a.sh", "trl sft --launcher 1 --num_processes 2").lines
    }


def test_three_commands_in_one_line_and_three_calls_of_one_kind(tmp_path: Path):
    keys = read(tmp_path, "a.sh", f"{TRAIN} --lora_rank 8; {TRAIN} --lora_rank 9; {TRAIN} --lora_rank 7").to_accept()
    assert [key for key in keys if key.startswith("further")] == ["further runs.line 1", "further runs.line 1 again"]
    script = "from trl import SFTConfig\nLoraConfig(r=8)\n" + "tokenizer.add_tokens(['x'])\n" * 4
    calls = [key for key in read(tmp_path, "a.py", script).to_accept() if key.startswith("calls")]
    assert calls == [f"calls.add_tokens{more}" for more in ("", " again", " again 3", " again 4")]


def test_files_that_are_not_regular_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("train.jsonl")
    Path("base").mkdir()
    for config in ('{"num_hidden_layers": 1e400}', '{"text_config": 5}', "[" * 9000, '{"n_layer": true}'):
        Path("base/config.json").write_text(config)
        text = "".join(
            f"{key}: {json.dumps(value)}\n" for key, value in {**MINIMAL["mlx"], "data": ".", "model": "base"}.items()
        )
        assert read(tmp_path, "a.yaml", text, "mlx").lines
