"""Mistakes that users make most often: a command with a wrong recipe or file, and its exact error and hint."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe
from tests.inputs.data_mistakes import DATA_MISTAKES
from tests.inputs.mistakes import write_model_with_code
from tests.inputs.model_mistakes import MODEL_MISTAKES
from tests.inputs.path_mistakes import PATH_MISTAKES

MISTAKES = {**MODEL_MISTAKES, **DATA_MISTAKES, **PATH_MISTAKES}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_its_exact_two_lines(name: str, recipe: WriteRecipe, lora: Lora):
    mistake = MISTAKES[name]
    recipe(mistake.changes)
    mistake.setup()
    result = lora(*mistake.command.split())
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert result.last_two == mistake.lines


def test_a_gguf_base_without_the_gguf_package_is_refused(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lora_cli.model.gguf_base.find_spec", lambda package: None)
    Path("x.gguf").write_bytes(b"GGUF")
    recipe({"model.path": "x.gguf"})
    result = lora("train", "recipe.yaml")
    assert result.code == 2
    assert result.last_two == [
        "error: x.gguf: reading GGUF needs the package gguf",
        'hint: pip install "lora-cli[gguf]"',
    ]


def test_trusted_remote_code_is_used_by_all_commands(recipe: WriteRecipe, lora: Lora):
    write_model_with_code()
    recipe({"model.path": "custom", "model.trust_remote_code": True})
    assert lora("check", "recipe.yaml").code == 0
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert lora("eval", "runs/a").code == 0
    assert lora("merge", "runs/a/adapter", "--out", "merged").code == 2
    merged = lora("merge", "runs/a/adapter", "--out", "merged", "--trust-remote-code")
    assert merged.code == 0, merged.err
    assert Path("merged/modeling_gizmo.py").exists()


def test_windows_is_refused_in_one_line_before_a_posix_module_is_imported():
    script = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "from lora_cli.__main__ import main\n"
        "sys.platform = 'win32'; sys.argv = ['lora', 'train', 'recipe.yaml']; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: lora runs on Linux and macOS; on Windows, use it in WSL\n"
