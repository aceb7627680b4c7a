"""The commands of docs/distributed.md and the Slurm template can be parsed, and name options that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from lora_cli import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_can_be_parsed(language: str, text: str):
    if language == "yaml":
        assert isinstance(yaml.safe_load(text), dict)
    elif language == "python":
        compile(text, "page", "exec")
    else:
        assert language == "bash"
        check_shell(text)


def test_options_of_lora_exist():
    train = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in train.params for option in parameter.opts}
    commands = re.findall(r"(?:lora|lora_cli) train ([^\n`#]*)", PAGE)
    used = {word for command in commands for word in command.split() if word.startswith("--")}
    assert {"--max-restarts", "--processes"} <= used <= known


def test_the_slurm_template_can_be_parsed_and_writes_to_no_fixed_place():
    text = (ROOT / "scripts" / "slurm.sbatch").read_text()
    check_shell(text)
    assert text.startswith("#!")
    assert "/home/" not in text


def test_the_scripts_that_the_page_names_exist():
    assert all((ROOT / name).is_file() for name in re.findall(r"`(scripts/[\w.]+)`", PAGE))
