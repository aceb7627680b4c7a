"""A model as a folder: transformers has in it the numbers of the source, cast or in 4 bits as it makes them itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.errors import LoraError
from lora_cli.export.hf import model as hf_model
from lora_cli.export.hf import verify
from lora_cli.export.source import Check, ExportSource
from lora_cli.model import safetensors_io
from lora_cli.model.tasks import TASKS
from tests.export.sources import export_source, model, options, subject, tokenizer
from tests.model.families import FAMILIES

WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    return subject("llama", tmp_path_factory.mktemp("llama") / "base")


def classifier(family: str, folder: Path, kind: LabelKind = "single") -> ExportSource:
    words, task = tokenizer(), FAMILIES[family].task
    made = model(family, vocabulary=len(words), pad_token_id=0, num_labels=2)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    labels = ClassLabels(kind, ("a", "b")) if TASKS[task].is_classification else None
    return export_source(family, folder, words, task=task, labels=labels)


def checks(found: ExportSource, out: Path, form: str | None, *, runtime: bool = True) -> dict[str, Check]:
    return {check.name: check for check in hf_model.prove(found, out, options(form, runtime=runtime))}


def exported(found: ExportSource, out: Path, form: str | None) -> dict[str, Check]:
    hf_model.refuse(found, options(form))
    hf_model.write(found, out, options(form))
    made = checks(found, out, form)
    assert [check for check in made.values() if not check.passed] == []
    return made


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def loaded(found: ExportSource, folder: Path, **given: Any) -> PreTrainedModel:
    made: PreTrainedModel = TASKS[found.task].auto_class.from_pretrained(folder, **given)
    return made.eval()


@pytest.mark.parametrize("form", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_cast_is_what_transformers_reads_in_that_dtype(form: str | None, tied: bool, tmp_path: Path):
    found = subject("llama", tmp_path / "base", tie_word_embeddings=tied)
    exported(found, tmp_path / "out", form)
    dtype = hf_model.DTYPES[form or "f32"]
    expected = loaded(found, found.folder, dtype=dtype).state_dict()
    ours = loaded(found, tmp_path / "out")
    assert ours.config.dtype == ours.dtype == dtype
    assert ours.config.tie_word_embeddings == tied
    assert ours.generation_config.eos_token_id == found.tokenizer.eos_token_id
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert tensors(tmp_path / "out").keys() == tensors(found.folder).keys()
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.get_vocab() == found.tokenizer.get_vocab()
    assert words.chat_template == found.tokenizer.chat_template


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert", "bert-tokens", "llama-classifier"])
def test_four_bits_are_those_of_transformers(family: str, tmp_path: Path):
    causal = FAMILIES[family].task == "causal-lm"
    found = subject(family, tmp_path / "base") if causal else classifier(family, tmp_path / "base")
    exported(found, tmp_path / "out", "nf4")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    made = loaded(found, found.folder, dtype=torch.bfloat16, quantization_config=four_bits)
    ours = loaded(found, tmp_path / "out")
    mine, theirs = ours.state_dict(), made.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(name.endswith(".weight.quant_state.bitsandbytes__nf4") for name in mine)
    # And what transformers saves of it is, but for blanks at the end of some JSON, what was written.
    made.save_pretrained(tmp_path / "theirs")
    written, saved = tensors(tmp_path / "out"), tensors(tmp_path / "theirs")
    assert written.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(written[name][: len(value)] if "quant_state" in name else written[name], value), name
        if "quant_state" in name:
            assert json.loads(bytes(written[name].tolist())) == json.loads(bytes(value.tolist()))
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section == json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]


def test_the_demo_model_in_four_bits(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "MAX_POSITIONS", 6)  # bitsandbytes multiplies slowly on a CPU
    words = AutoTokenizer.from_pretrained(demo_folder)
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    found = export_source("demo", demo_folder, words, prompts=(tuple(prompt),))
    made = exported(found, tmp_path / "out", "nf4")
    assert made["tensors"].figures["packed"] == 106_168_320  # all linear layers, not the embeddings
    assert 0 < made["note"].figures["kl"] < 2
    assert (tmp_path / "out" / WHOLE).stat().st_size < 0.22 * (demo_folder / WHOLE).stat().st_size


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "llama-classifier"])
@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_classifiers_of_every_kind(family: str, kind: LabelKind, tmp_path: Path):
    found = classifier(family, tmp_path / "base", kind)
    for form in (None, "f16"):
        assert exported(found, tmp_path / f"out-{form}", form)["distribution"].passed


def test_half_precision_is_kept_in_four_bits(llama: ExportSource, tmp_path: Path):
    exported(llama, tmp_path / "half", "f16")
    found = llama.at(tmp_path / "half")
    exported(found, tmp_path / "out", "nf4")
    made, source = tensors(tmp_path / "out"), tensors(tmp_path / "half")
    assert torch.equal(made["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_large_models_are_several_files(llama: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_model, "MAX_SHARD_BYTES", 50_000)
    for form in ("bf16", "nf4"):
        exported(llama, tmp_path / form, form)
        files = list((tmp_path / form).glob("*.safetensors"))
        index = json.loads((tmp_path / form / "model.safetensors.index.json").read_text())
        assert {path.name for path in files} == set(index["weight_map"].values())
        assert all(path.stat().st_size < 60_000 for path in files)


def altered(llama: ExportSource, folder: Path, name: str, change: Any) -> ExportSource:
    """The llama with one tensor changed."""
    exported(llama, folder, None)
    held = load_file(folder / WHOLE)
    held[name] = change(held[name])
    save_file(held, folder / WHOLE)
    return llama.at(folder)


def test_what_a_dtype_cannot_hold_is_refused_by_name(llama: ExportSource, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"

    def enlarge(value: Tensor) -> Tensor:
        value[3, 5] = 70_000
        return value

    found = altered(llama, tmp_path / "large", name, enlarge)
    with pytest.raises(LoraError, match=rf"{name}: 7e\+04 is too large for float16"):
        hf_model.write(found, tmp_path / "out", options("f16"))
    exported(found, tmp_path / "wide", "bf16")


@pytest.mark.parametrize("form", [None, "f32", "f16", "bf16", "nf4"])
def test_what_differs_is_found_out(form: str | None, llama: ExportSource, tmp_path: Path):
    exported(llama, tmp_path / "out", form)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        held = load_file(tmp_path / "out" / WHOLE)
        value, before = held[name].view(-1), held[name].clone()
        if value.dtype == torch.uint8:
            value[7] ^= 1
        else:  # by the least that there is
            value[7] = torch.nextafter(value[7], torch.tensor(torch.inf, dtype=value.dtype))
        save_file(held, tmp_path / "out" / WHOLE)
        assert not checks(llama, tmp_path / "out", form, runtime=False)["tensors"].passed, name
        held[name] = before
        save_file(held, tmp_path / "out" / WHOLE)
    assert checks(llama, tmp_path / "out", form, runtime=False)["tensors"].passed
    held = load_file(tmp_path / "out" / WHOLE)
    save_file({key: value for key, value in held.items() if "norm" not in key}, tmp_path / "out" / WHOLE)
    assert not checks(llama, tmp_path / "out", form, runtime=False)["tensors"].passed


@pytest.mark.parametrize(
    ("form", "key", "value"),
    [
        ("bf16", "rms_norm_eps", 0.01),
        ("nf4", "rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
        (None, "hidden_act", "gelu"),
    ],
)
def test_a_wrong_configuration_is_found_out_by_running(
    form: str | None, key: str, value: Any, llama: ExportSource, tmp_path: Path
):
    exported(llama, tmp_path / "out", form)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config[key] != value
    file.write_text(json.dumps(config | {key: value}))
    made = checks(llama, tmp_path / "out", form)
    assert made["tensors"].passed
    assert not made["distribution"].passed
    assert not made["text"].passed


def test_rows_that_the_cpu_kernels_mistake_are_not_run(tmp_path: Path):
    found = subject("llama", tmp_path / "base", intermediate_size=96)
    made = exported(found, tmp_path / "out", "nf4")
    assert "not run" in made["note"].found
    assert "distribution" not in made


def test_what_cannot_be_written_is_refused(llama: ExportSource, tmp_path: Path):
    with pytest.raises(LoraError, match="--quantize q8_0 is none") as caught:
        hf_model.refuse(llama, options("q8_0"))
    assert "--to gguf" in str(caught.value.hint)
    with pytest.raises(LoraError, match="no linear layer"):
        hf_model.refuse(subject("falcon", tmp_path / "falcon"), options("nf4"))
    exported(llama, tmp_path / "packed", "nf4")
    packed = llama.at(tmp_path / "packed")
    with pytest.raises(LoraError, match="quantised already"):
        hf_model.refuse(packed, options("bf16"))


def test_a_full_disk_is_told_before_anything_is_written(llama: ExportSource, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(hf_model.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(LoraError, match="GB are free"):
        hf_model.write(llama, tmp_path / "out", options("f32"))
    assert list((tmp_path / "out").iterdir()) == []


def test_one_tensor_is_in_memory_at_a_time(llama: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    read, write = hf_model.read_tensor, safetensors_io.ShardFiles.write
    monkeypatch.setattr(hf_model, "read_tensor", lambda stored, files: steps.append("read") or read(stored, files))
    monkeypatch.setattr(
        safetensors_io.ShardFiles,
        "write",
        lambda files, path, data, at: steps.append("write") or write(files, path, data, at),
    )
    hf_model.write(llama, tmp_path / "out", options("bf16"))
    assert steps[0] == "write"  # of the header
    assert steps[1:] == ["read", "write"] * len(tensors(tmp_path / "out"))


def test_the_lines_of_python_load_it(llama: ExportSource, tmp_path: Path):
    exported(llama, tmp_path / "my out", "bf16")
    lines = hf_model.usage(llama, tmp_path / "my out", options("bf16"))
    space: dict[str, Any] = {}
    exec("\n".join(lines[:3]), space)
    assert space["model"].dtype == torch.bfloat16
    assert any(line.startswith("vllm serve ") and "'" in line for line in lines)
