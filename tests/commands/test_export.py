"""`lora export` as one types it: the run of the tiny model into every format, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.export import EXPORTERS
from lora_cli.export.gguf import model as gguf_format
from lora_cli.export.source import Check
from tests.commands.conftest import Lora


def verdict(file: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(file).read_text())
    return found


def test_the_list_says_what_each_format_needs(lora: Lora, monkeypatch: pytest.MonkeyPatch):
    done = lora("export", "--to", "list")
    assert done.code == 0
    for name in EXPORTERS:
        assert f"\n{name} " in f"\n{done.out}"
    assert "not installed" not in done.out
    monkeypatch.setattr("lora_cli.export.find_spec", lambda package: None)
    assert "not installed: gguf, xllamacpp" in lora("export", "--to", "list").out


def test_an_adapter_becomes_a_gguf_file_that_is_proven(trained: Path, lora: Lora):
    done = lora("export", trained, "--to", "gguf", "--quantize", "f32", "--out", "a.gguf")
    assert (done.code, done.out) == (0, "a.gguf\n"), done.err
    for name in ("tensors", "chats", "stop", "distribution", "text"):
        assert f"{name}: verified: " in done.err
    told = verdict("a.export.json")
    assert told["format"] == "gguf"
    checks = {check["name"]: check["passed"] for check in told["checks"]}  # type: ignore[attr-defined]
    assert checks.keys() - {"note"} == {"tensors", "chats", "stop", "distribution", "text"}
    assert all(checks.values())
    assert told["files"]["."]["bytes"] == Path("a.gguf").stat().st_size  # type: ignore[index]
    assert not list(Path().glob(".tmp*"))


def test_an_adapter_becomes_a_folder_for_ollama(trained: Path, lora: Lora):
    done = lora("export", trained, "--to", "ollama", "--quantize", "f32", "--out", "o")
    assert done.code == 0, done.err
    assert {file.name for file in Path("o").iterdir()} == {"model.gguf", "Modelfile", "export.json"}
    assert "template: verified: 20 of 20 chats" in done.err
    assert "ollama create" in done.err


def test_an_adapter_becomes_a_graph_for_onnxruntime(trained: Path, lora: Lora):
    done = lora("export", trained, "--to", "onnx", "--out", "o")
    assert done.code == 0, done.err
    assert Path("o/model.onnx").is_file()
    for name in ("tensors", "logits", "text"):
        assert f"{name}: verified: " in done.err


def test_over_nothing_but_by_force(trained: Path, lora: Lora):
    Path("a.gguf").write_text("mine")
    words = ("export", trained / "adapter", "--to", "gguf-adapter", "--out", "a.gguf", "--verify", "file")
    done = lora(*words)
    assert done.last_two[0] == "error: --out a.gguf exists"
    assert Path("a.gguf").read_text() == "mine"
    assert lora(*words, "--force").code == 0
    assert Path("a.gguf").read_bytes()[:4] == b"GGUF"


def test_a_model_as_it_is(place: Path, lora: Lora):
    done = lora("export", "base", "--to", "safetensors", "--quantize", "bf16", "--out", "out")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype.is_floating_point
    assert verdict("out/export.json")["source"]["target"] == "base"  # type: ignore[index]


def test_adapter_folders_for_servers(trained: Path, lora: Lora):
    for to in ("vllm", "peft"):
        done = lora("export", trained, "--to", to, "--out", to)
        assert done.code == 0, done.err
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (trained / "adapter", Path(to)))
        assert ours.keys() == theirs.keys()
    assert (
        "vllm serve base --enable-lora --max-lora-rank 8"
        in lora("export", trained, "--to", "vllm", "--out", "vllm", "--force").err
    )


def test_an_export_that_is_not_the_model_is_not_put_in_place(
    trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    wrong = Check("tensors", False, "1 of 21 tensors is another")
    monkeypatch.setattr(gguf_format, "prove", lambda *_: iter([wrong]))
    done = lora("export", trained, "--to", "gguf", "--out", "a.gguf")
    assert done.code == 1
    assert done.last_two[0] == "error: the export differs from the model: tensors: 1 of 21 tensors is another"
    assert [path.name for path in Path().iterdir() if "gguf" in path.name or path.name.startswith(".tmp")] == []


def test_a_runtime_that_is_not_installed_is_told(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    there = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("lora_cli.export.find_spec", lambda name: None if name == "xllamacpp" else there(name))
    words = ("export", trained, "--to", "gguf", "--out", "a.gguf")
    done = lora(*words, "--verify", "runtime")
    assert done.last_two == [
        "error: running the export in llama.cpp needs the package xllamacpp",
        'hint: pip install "lora-cli[llama-cpp]"',
    ]
    done = lora(*words)
    assert done.code == 0, done.err
    assert "note: read back, but not run: the package xllamacpp is not installed" in done.err


@pytest.mark.parametrize(
    ("words", "says", "does"),
    [
        (("base", "--to", "gguf"), "--out is missing", "--out PATH"),
        (("base", "--to", "gguf", "--out", "a"), "--out a: gguf is one file, whose name ends in .gguf", "--out a.gguf"),
        (("base", "--to", "gguf", "--out", "no/a.gguf"), "there is no folder no", "make it first"),
        (("base", "--to", "tflite", "--out", "a"), "--to tflite is not known", "gguf"),
        (("base", "--to", "peft", "--out", "a"), "--to peft takes an adapter, and base is a model", "adapter"),
        (("base", "--to", "onnx", "--out", "base", "--force"), "is an input of the export", "another place"),
        (
            ("base", "--to", "gguf", "--out", "a.gguf", "--over", "b.gguf"),
            "--over is for --to gguf-adapter",
            "leave it",
        ),
        (("base", "--to", "gguf", "--out", "a.gguf", "--quantize", "q4_k_m"), "--quantize q4_k_m", "llama-quantize"),
        (("nowhere/at/all", "--to", "gguf", "--out", "a.gguf"), "there is no folder nowhere/at/all", "model.path"),
    ],
)
def test_mistakes_are_answered_in_two_lines(words: tuple[str, ...], says: str, does: str, place: Path, lora: Lora):
    done = lora("export", *words)
    assert done.code == 2
    assert says in done.last_two[0]
    assert does in done.last_two[1]
    assert "Traceback" not in done.err


def test_a_tokenizer_that_is_missing(place: Path, lora: Lora):
    shutil.copytree("base", "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat_template*"))
    done = lora("export", "bare", "--to", "gguf", "--out", "a.gguf")
    assert done.code == 2
    assert "tokenizer" in done.last_two[0]
    assert not Path("a.gguf").exists()


def test_a_tensor_that_is_missing(place: Path, lora: Lora):
    shutil.copytree("base", "less")
    file = Path("less/model.safetensors")
    save_file(
        {key: value for key, value in load_file(file).items() if "layers.1.mlp.up" not in key}, file, {"format": "pt"}
    )
    done = lora("export", "less", "--to", "gguf", "--out", "a.gguf")
    assert done.last_two[0] == "error: less: its files have no model.layers.1.mlp.up_proj.weight"
