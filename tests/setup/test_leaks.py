"""Secrets and paths are found in headers, metadata and large files; vocabularies and names of classes are any text."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cli.setup import leaks
from lora_cli.setup.publishable import PublishedFile

KEY = "AKIAIOSFODNN7EXAMPLE"


def found(path: Path, token: str | None = None) -> list[str]:
    file = PublishedFile(path.name, path, path.stat().st_size, "")
    return [leak.describe() for leak in leaks.find_leaks([file], token=token)]


def test_the_metadata_of_weights(tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(4)}, weights, metadata={"source": "/home/anna/base", "note": KEY})
    assert found(weights) == [
        f"model.safetensors, line 1: an access key of AWS ({KEY[:6]}...)",
        "model.safetensors, line 1: a path of this machine, /home/anna/base",
    ]
    save_file({"x": np.frombuffer(f"/home/anna/base {KEY}    ".encode(), dtype=np.uint8)}, weights)
    assert found(weights) == [], "values of tensors are numbers"


def test_the_metadata_of_gguf(tmp_path: Path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.source.url", "/models/base/model")
    writer.add_string("tokenizer.chat_template", "/think/{{ messages }}")
    writer.add_token_list(["/home/anna/x", "b"])
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert found(path) == ["model.gguf, general.source.url: a path of this machine, /models/base/model"]


def test_a_large_file_is_searched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(leaks, "OVERLAP_BYTES", 64)
    path = tmp_path / "model.onnx"
    for position in range(60, 120):
        path.write_bytes(b" " * position + KEY.encode() + b" " * 300)
        assert found(path) == [f"model.onnx: an access key of AWS ({KEY[:6]}...)"], position
    path.write_bytes(b"\0" * 95 + b' "/home/anna/x.py" ' + b"\0" * 300)
    assert found(path) == ["model.onnx: a path of this machine, /home/anna/x.py"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tokenizer.json", {"model": {"vocab": {"/home/anna/": 1}}}, None),
        ("config.json", {"id2label": {"0": "/m/01280g/x"}}, None),
        ("config.json", {"_name_or_path": "/models/llama"}, "_name_or_path"),
        ("config.json", {"text_config": {"_name_or_path": "~/llama"}}, "text_config._name_or_path"),
        ("config.json", {"auto_map": {"AutoModel": "org/name--modeling.Model"}}, None),
        ("adapter_config.json", {"target_modules": ["q_proj", "/"]}, None),
        ("trained_on.json", {"base": {"name": "C:\\models\\base"}}, "base.name"),
        ("export.json", {"source": {"target": "org/name", "base": "/data/base"}}, "source.base"),
    ],
)
def test_values_of_json(name: str, value: object, expected: str | None, tmp_path: Path):
    path = tmp_path / name
    path.write_text(json.dumps(value))
    lines = found(path)
    assert len(lines) == (expected is not None), lines
    assert expected is None or lines[0].startswith(f"{name}, {expected}: a path of this machine, ")


def test_folders_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_CACHE", "/scratch/cache")
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"made in {tmp_path}/runs, cached in /scratch/cache; not /scratch/cached or /opt/x")
    assert found(readme) == [
        f"README.md, line 1: a path of this machine, {tmp_path}/runs,",
        "README.md, line 1: a path of this machine, /scratch/cache;",
    ]


def test_forms_of_secrets_are_documented_ones():
    texts = {
        "a token of Hugging Face": "hf_" + "aB3" * 11 + "x",
        "a secret key of AWS": 'aws_secret_access_key = "' + "a/B+" * 10 + '"',
        "a token of GitLab": "glpat-" + "x" * 20,
        "an API key of OpenAI or Anthropic": "sk-ant-" + "x" * 40,
        "an API key of Google": "AIza" + "x" * 35,
        "a token of Slack": "xoxb-1234567890-abc",
        "an API key of Weights & Biases": "WANDB_API_KEY=" + "0f" * 20,
        "a key of an Azure account": "AccountKey=" + "x" * 86 + "==",
        "a signed URL": "https://a.b/c?X-Amz-Signature=" + "0f" * 32,
    }
    for name, text in texts.items():
        match = leaks._SECRET.search(text.encode())
        assert match is not None, name
        assert list(leaks.SECRETS)[(match.lastindex or 1) - 1] == name
    for harmless in ("hf_writer", "sk-learn", "0f" * 32, "https://example.org:443/a", "task-" + "x" * 40):
        assert leaks._SECRET.search(harmless.encode()) is None, harmless
