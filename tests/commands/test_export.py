"""`lora export` of a run in every format, its verification, and refused exports."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.export import EXPORTERS
from lora_cli.export.gguf import model as gguf_format
from lora_cli.export.source import Check
from tests.commands.conftest import Lora


def read_report(file: str) -> dict[str, object]:
    report: dict[str, object] = json.loads(Path(file).read_text())
    return report


def test_the_list_of_formats_shows_missing_packages(lora: Lora, monkeypatch: pytest.MonkeyPatch):
    result = lora("export", "--to", "list")
    assert result.code == 0
    for name in EXPORTERS:
        assert f"\n{name} " in f"\n{result.out}"
    assert "not installed" not in result.out
    monkeypatch.setattr("lora_cli.export.find_spec", lambda package: None)
    assert "not installed: gguf, xllamacpp" in lora("export", "--to", "list").out


@pytest.mark.slow
def test_an_adapter_is_exported_to_gguf_and_verified(trained_run: Path, lora: Lora):
    result = lora("export", trained_run, "--to", "gguf", "--quantize", "f32", "--out", "a.gguf")
    assert (result.code, result.out) == (0, "a.gguf\n"), result.err
    for name in ("tensors", "chats", "stop", "distribution", "text"):
        assert f"{name}: verified: " in result.err
    report = read_report("a.export.json")
    assert report["format"] == "gguf"
    checks = {check["name"]: check["passed"] for check in report["checks"]}  # type: ignore[attr-defined]
    assert checks.keys() - {"note"} == {"tensors", "chats", "stop", "distribution", "text"}
    assert all(checks.values())
    assert report["files"]["."]["bytes"] == Path("a.gguf").stat().st_size  # type: ignore[index]
    assert not list(Path().glob(".tmp*"))


def test_an_adapter_is_exported_to_a_folder_for_ollama(trained_run: Path, lora: Lora):
    result = lora("export", trained_run, "--to", "ollama", "--quantize", "f32", "--out", "o")
    assert result.code == 0, result.err
    assert {file.name for file in Path("o").iterdir()} == {"model.gguf", "Modelfile", "export.json", "checksums.json"}
    assert "template: verified: 20 of 20 chats" in result.err
    assert "ollama create" in result.err


@pytest.mark.slow
def test_an_adapter_is_exported_to_onnx_and_verified(trained_run: Path, lora: Lora):
    result = lora("export", trained_run, "--to", "onnx", "--out", "o")
    assert result.code == 0, result.err
    assert Path("o/model.onnx").is_file()
    for name in ("tensors", "logits", "text"):
        assert f"{name}: verified: " in result.err


def test_an_existing_file_is_replaced_only_with_force(trained_run: Path, lora: Lora):
    Path("a.gguf").write_text("GGUF: mine")
    arguments = ("export", trained_run / "adapter", "--to", "gguf-adapter", "--out", "a.gguf", "--verify", "file")
    result = lora(*arguments)
    assert result.last_two[0] == "error: --out a.gguf exists"
    assert Path("a.gguf").read_text() == "GGUF: mine"
    assert lora(*arguments, "--force").code == 0
    assert Path("a.gguf").stat().st_size > 1000
    Path("a.gguf").write_text("mine")
    assert lora(*arguments, "--force").last_two[0] == "error: --out a.gguf is not replaced: it is no gguf file"
    assert Path("a.gguf").read_text() == "mine"


def test_a_model_without_adapter_is_exported(workdir: Path, lora: Lora):
    result = lora("export", "base", "--to", "safetensors", "--quantize", "bf16", "--out", "out")
    assert result.code == 0, result.err
    assert AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype.is_floating_point
    assert read_report("out/export.json")["source"]["target"] == "base"  # type: ignore[index]


def test_an_adapter_is_exported_to_the_folders_of_peft_and_vllm(trained_run: Path, lora: Lora):
    for to in ("vllm", "peft"):
        result = lora("export", trained_run, "--to", to, "--out", to)
        assert result.code == 0, result.err
        name = "adapter_model.safetensors"
        assert load_file(trained_run / "adapter" / name).keys() == load_file(Path(to) / name).keys()
    assert (
        "vllm serve base --enable-lora --max-lora-rank 8"
        in lora("export", trained_run, "--to", "vllm", "--out", "vllm", "--force").err
    )


def test_an_export_that_differs_from_the_model_is_removed(
    trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    wrong = Check("tensors", False, "1 of 21 tensors is another")
    monkeypatch.setattr(gguf_format, "verify", lambda *_: iter([wrong]))
    result = lora("export", trained_run, "--to", "gguf", "--out", "a.gguf")
    assert result.code == 1
    assert result.last_two[0] == "error: the export differs from the model: tensors: 1 of 21 tensors is another"
    assert [path.name for path in Path().iterdir() if "gguf" in path.name or path.name.startswith(".tmp")] == []


def test_a_runtime_that_is_not_installed_is_reported(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_cli.export.find_spec", lambda name: None if name == "xllamacpp" else find_spec(name))
    arguments = ("export", trained_run, "--to", "gguf", "--out", "a.gguf")
    result = lora(*arguments, "--verify", "runtime")
    assert result.last_two == [
        "error: running the export in llama.cpp needs the package xllamacpp",
        'hint: pip install "lora-cli[llama-cpp]"',
    ]
    result = lora(*arguments)
    assert result.code == 0, result.err
    assert "note: read back, but not run: the package xllamacpp is not installed" in result.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("base", "--to", "gguf"), "--out is missing", "--out PATH"),
        (("base", "--to", "gguf", "--out", "a"), "--out a: gguf is one file, whose name ends in .gguf", "--out a.gguf"),
        (("base", "--to", "gguf", "--out", "no/a.gguf"), "there is no folder no", "make it first"),
        (("base", "--to", "tflite", "--out", "a"), "--to tflite is not known", "gguf"),
        (("base", "--to", "peft", "--out", "a"), "--to peft needs an adapter, but base is a model", "adapter"),
        (("base", "--to", "onnx", "--out", "base", "--force"), "is an input of the export", "another folder"),
        (
            ("base", "--to", "gguf", "--out", "a.gguf", "--over", "b.gguf"),
            "--over is for --to gguf-adapter",
            "leave it",
        ),
        (("base", "--to", "gguf", "--out", "a.gguf", "--quantize", "q4_k_m"), "--quantize q4_k_m", "llama-quantize"),
        (("nowhere/at/all", "--to", "gguf", "--out", "a.gguf"), "nowhere/at/all does not exist", "hub id"),
    ],
)
def test_wrong_arguments_give_an_error_and_a_hint(
    arguments: tuple[str, ...], message: str, hint: str, workdir: Path, lora: Lora
):
    result = lora("export", *arguments)
    assert result.code == 2
    assert message in result.last_two[0]
    assert hint in result.last_two[1]
    assert "Traceback" not in result.err


def test_a_model_without_tokenizer_is_refused(workdir: Path, lora: Lora):
    shutil.copytree("base", "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat_template*"))
    result = lora("export", "bare", "--to", "gguf", "--out", "a.gguf")
    assert result.code == 2
    assert "tokenizer" in result.last_two[0]
    assert not Path("a.gguf").exists()


def test_a_model_without_one_of_its_tensors_is_refused(workdir: Path, lora: Lora):
    shutil.copytree("base", "incomplete")
    file = Path("incomplete/model.safetensors")
    save_file(
        {key: value for key, value in load_file(file).items() if "layers.1.mlp.up" not in key}, file, {"format": "pt"}
    )
    result = lora("export", "incomplete", "--to", "gguf", "--out", "a.gguf")
    assert result.last_two[0] == "error: incomplete: its files have no model.layers.1.mlp.up_proj.weight"
