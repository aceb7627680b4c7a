"""`lora env`: the report has what an issue needs, nothing of the person, and a line for each broken library."""

import json
import sys
from pathlib import Path

import pytest

from lora_cli.commands import env
from lora_cli.run import redact
from tests.commands.conftest import Lora


@pytest.fixture
def without_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import a fast library in place of torch and the others."""
    monkeypatch.setattr(env, "IMPORTED", ("json",))


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user and a machine whose names must not appear."""
    monkeypatch.setattr(redact, "_identity", lambda: ("/home/ada", "ada", "babbage.local", "babbage"))
    monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.usefixtures("without_imports")
def test_text_and_json_report_the_same(lora: Lora):
    result = lora("env", "--json", "-")
    report = json.loads(result.out)
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert report["versions"]["torch"].startswith("2.")
    assert report["memory"]["total"] > 1 << 28
    assert report["cpu"]["cores"] >= 1
    assert report["problems"] == {}
    assert set(report["caches"]) == {"lora", "hub", "datasets"}
    text = lora("env").out
    assert f"torch {report['versions']['torch']}" in text
    assert report["cpu"]["model"] in text


@pytest.mark.usefixtures("without_imports", "person")
def test_no_secret_and_no_name_is_in_the_report(monkeypatch: pytest.MonkeyPatch, lora: Lora):
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_HOME": "/home/ada/cache/hf",
        "LORA_CACHE": "/scratch/ada/lora",
        "HF_ENDPOINT": "https://ada:geheim@hub.example.org",
        "TORCH_LOGS": "on babbage.local and babbage",
        "HF_DEBUG": "hf_ZYXWVUTSRQPONM",
        "HTTPS_PROXY": "http://ada:geheim@proxy:3128",
        "HTTP_PROXY": "ada:geheim@proxy:3128",
        "no_proxy": "http://ada:ge/heim@geheim@proxy:3128",
        "WANDB_BASE_URL": "https://example.org/?sig=geheim",
        "NCCL_PWD": "geheim",
        "WANDB_PASS": "geheim",
        "LD_LIBRARY_PATH": "/home/grace/lib:/home/ada/lib",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_TWO_LINES": "one\ntwo\x1b[2J",
        "OTHER_SECRET": "not even its name",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for words in (["env"], ["env", "--json"]):
        text = lora(*words).out
        for hidden in (
            "ada",
            "babbage",
            "geheim",
            "abcdefghij",
            "0123456789abcdef",
            "ZYXWVUT",
            "OTHER_SECRET",
            "grace",
            "\x1b",
        ):
            assert hidden not in text, hidden
    settings = json.loads(text)["environment"]
    assert settings["HF_TOKEN"] == settings["WANDB_API_KEY"] == "(set, not shown)"
    assert settings["HF_HOME"] == "~/cache/hf"
    assert settings["LORA_CACHE"] == "/scratch/USER/lora"
    assert settings["HF_ENDPOINT"] == "https://hub.example.org"
    assert settings["HTTP_PROXY"] == "proxy:3128"
    assert settings["no_proxy"] == "http://proxy:3128"
    assert settings["LD_LIBRARY_PATH"] == "/home/USER/lib:~/lib"
    assert settings["TOKENIZERS_PARALLELISM"] == "false"
    assert settings["TORCH_LOGS"] == "on HOST and HOST"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("import os; os.abort()", "its import ended with exit code -6"),
    ],
)
def test_a_broken_library_is_a_line(
    source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Lora
):
    (tmp_path / "broken_library.py").write_text(f"print('noise'); {source}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(env, "IMPORTED", ("json", "broken_library"))
    result = lora("env")
    assert result.code == 0
    assert f"broken: broken_library: {problem}" in result.out.splitlines()
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_torch_tells_what_it_finds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(env, "IMPORTED", ("torch",))
    found = env._imports()
    assert found["problems"] == {}
    assert found["torch"]["threads"] >= 1


def test_gpus_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a program in place of nvidia-smi, whose output has the form of its --format=csv,noheader."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.86.15, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu = {"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "570.86.15", "compute": "9.0"}
    assert env._gpus() == {"found": [gpu], "why": None}
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert env._gpus()["found"] == []
    assert "NVIDIA-SMI has failed" in env._gpus()["why"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert env._gpus() == {"found": [], "why": "there is no nvidia-smi"}
