"""Shell completion, by the protocols of bash, zsh and fish, and in a real bash."""

import subprocess
import sys
from pathlib import Path

import pytest

import lora_cli
from lora_cli.cli.completion import join_words
from tests.commands.conftest import Lora


@pytest.fixture
def complete(lora: Lora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that completes the last of the words as bash asks it: `complete("train", "--re")`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> list[str]:
        monkeypatch.setenv("_LORA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["lora", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        result = lora()
        assert (result.code, result.err) == (0, "")
        return result.out.split()

    return run


def test_commands_options_and_their_values(complete):
    assert complete("tr") == ["train"]
    assert complete("-q", "adapter", "res") == ["resize"]
    assert complete("train", "r.yaml", "--max") == ["--max-restarts"]
    assert complete("merge", "x", "--dtype", "b") == ["bfloat16"]
    assert complete("export", "x", "--to", "g") == ["gguf", "gguf-adapter"]
    assert complete("adapter", "combine", "a", "--method", "c") == ["concat"]
    assert "quickstart" in complete("init", "")
    assert complete("init", "quick") == ["quickstart"]
    assert complete("schema", "training.learn") == ["training.learning_rate"]


def test_keys_of_set_with_their_choices(complete):
    assert "training.learning_rate=" in complete("train", "r.yaml", "--set", "training.l")
    assert complete("train", "r.yaml", "--set", "training.learning_r") == [
        "training.learning_rate=",
        "training.learning_rate=0.0002",
    ]
    assert "adapter.method=dora" in complete("check", "r.yaml", "--set", "adapter.meth")
    assert complete("train", "r.yaml", "--set", "training.nothing") == []
    assert not any(key in ("model=", "adapter=") for key in complete("train", "r.yaml", "--set", "")), "sections"
    assert complete("train", "r.yaml", "--set", "model.trust_remote_code", "=", "t") == ["true"]


def test_bash_splits_words_at_equals_signs_and_gets_back_its_own_part(complete):
    assert complete("train", "r.yaml", "--set", "adapter.method", "=", "do") == ["dora"]
    assert "dora" in complete("train", "r.yaml", "--set", "adapter.method", "=")
    assert complete("export", "x", "--to", "=", "on") == ["onnx"]
    assert complete("train", "r.yaml", "--set", "adapter.rank", "=", "4", "--fre") == ["--fresh"]
    # Without an equals sign in COMP_WORDBREAKS, it does not split.
    assert complete("train", "r.yaml", "--set", "adapter.method=do") == ["adapter.method=dora"]


@pytest.mark.parametrize(
    ("words", "joined", "split_off"),
    [
        (["--set", "a.b", "=", "c"], ["--set", "a.b=c"], "a.b="),
        (["--set", "a.b", "="], ["--set", "a.b="], "a.b="),
        (["--set", "a.b", "=", ""], ["--set", "a.b=", ""], ""),
        (["--set", "a.b=c"], ["--set", "a.b=c"], ""),
        (["a", "b"], ["a", "b"], ""),
    ],
)
def test_words_of_bash_are_joined(words: list[str], joined: list[str], split_off: str):
    assert join_words(words) == (joined, split_off)


def test_runs_and_adapters_are_found_here_and_in_runs(complete, tmp_path: Path):
    for folder in ("runs/a", "runs/b", "here", "runs/a/adapter", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file in (
        "runs/a/.lora-lock",
        "runs/b/.lora-lock",
        "here/adapter_config.json",
        "runs/a/adapter/adapter_config.json",
    ):
        (tmp_path / file).touch()
    assert complete("chat", "") == ["here", "runs/a", "runs/b"]
    assert complete("merge", "runs/") == ["runs/a", "runs/b"]
    assert complete("merge", "runs/a/") == ["runs/a/adapter"]
    assert complete("eval", "runs/a", "--adapter", "runs/b") == ["runs/b"]
    assert complete("adapter", "combine", "0.5*runs/b") == ["0.5*runs/b"]
    assert complete("eval", "missing/") == []


@pytest.mark.parametrize(
    ("shell", "option", "expected"),
    [
        ("zsh", "--set ", """_arguments '*: :(("adapter.method=dora"))'"""),
        ("fish", "--set ", "adapter.method=dora"),
        ("zsh", "--set=", """_arguments '*: :(("--set=adapter.method=dora"))'"""),
        ("fish", "--set=", "--set=adapter.method=dora"),
    ],
)
def test_zsh_and_fish(shell: str, option: str, expected: str, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_LORA_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"lora train r.yaml {option}adapter.method=do")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert lora().out.strip() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    result = lora("--show-completion")
    assert result.code == 0
    assert "_LORA_COMPLETE=complete_" + shell in result.out


@pytest.mark.parametrize("option", ["--show-completion", "--install-completion"])
def test_the_name_of_another_shell_is_refused(option: str, lora: Lora):
    result = lora(option, "fish")
    assert result.code == 2
    assert result.last_two == [
        f"error: {option} is for the shell that it is typed in, and takes nothing else",
        f"hint: start that shell, and type: lora {option}",
    ]


BASH = r"""
eval "$SCRIPT"
COMP_WORDS=(lora train r.yaml --set adapter.method = do); COMP_CWORD=6
_lora_completion lora
printf '%s\n' "${COMPREPLY[@]}"
complete -p lora
"""


@pytest.mark.slow
def test_bash_itself_completes(lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    script = lora("--show-completion").out
    program = tmp_path / "lora"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_cli "$@"\n')
    program.chmod(0o755)
    environment = {"SCRIPT": script, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    environment["PYTHONPATH"] = str(Path(lora_cli.__file__).parents[1])
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stdout.splitlines() == ["dora", "complete -o default -F _lora_completion lora"]
