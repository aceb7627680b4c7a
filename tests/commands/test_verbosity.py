"""--quiet and --verbose: what is printed, before and after the subcommand."""

import re
from pathlib import Path

import pytest

from lora_cli.run import console
from tests.commands.conftest import Lora, WriteRecipe


@pytest.mark.parametrize("words", [["-q", "init"], ["init", "--quiet"], ["init", "-q"]])
def test_quiet_leaves_out_messages_and_keeps_results(words: list[str], lora: Lora):
    result = lora(*words)
    assert result.err == ""
    assert "quickstart" in result.out
    assert "lora init NAME" in lora("init").err, "the next command is not quiet"


def test_quiet_keeps_errors(lora: Lora):
    assert lora("-q", "check", "missing.yaml").err.startswith("error: missing.yaml does not exist\nhint: ")
    assert len(lora("train", "-q").err.splitlines()) == 2


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]):
    console.set_verbosity(be_quiet=True)
    try:
        for line in ("note: one", "warning: two", "a message"):
            console.info(line)
        with console.step_progress(2) as progress:
            progress.step(1, {"loss": "1"}, loss=1.0)
            progress.info("note: three")
            progress.info("eval at step 1")
    finally:
        console.set_verbosity()
    assert capsys.readouterr().err.splitlines() == ["note: one", "warning: two", "note: three"]


def test_verbose_writes_the_seconds_before_each_message(lora: Lora):
    for words in (["-v", "init"], ["init", "--verbose"]):
        result = lora(*words)
        assert re.fullmatch(r"\[ +\d+\.\d s\] lora init NAME writes one into this folder\n", result.err)
        assert result.out == lora("init").out


def test_verbose_prints_the_cause_of_an_error(lora: Lora, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff")
    plain, verbose = (lora(*words, "check", tmp_path / "recipe.yaml") for words in ([], ["-v"]))
    assert "Traceback" not in plain.err
    assert "UnicodeDecodeError" in verbose.err
    assert verbose.last_two == plain.err.splitlines()[-2:]


@pytest.mark.slow
def test_a_quiet_training_prints_its_adapter_and_warnings(recipe: WriteRecipe, lora: Lora):
    recipe()
    result = lora("train", "recipe.yaml", "--quiet")
    assert (result.code, result.out) == (0, "runs/a/adapter\n")
    assert all(line.startswith("note: ") for line in result.err.splitlines()), result.err
