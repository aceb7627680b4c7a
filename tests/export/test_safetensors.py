"""Export to safetensors: transformers loads the source's weights, cast, or in 4 bits as it quantizes them itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.errors import LoraError
from lora_cli.export.hf import model as hf_model
from lora_cli.export.hf import verify
from lora_cli.export.source import Check, ExportSource
from lora_cli.model import safetensors_io
from lora_cli.model.tasks import TASKS
from tests.export.sources import export_source, options, tiny_model, tiny_source, tokenizer
from tests.model.families import FAMILIES

WEIGHTS_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    return tiny_source("llama", tmp_path_factory.mktemp("llama") / "base")


def classifier(family: str, folder: Path, kind: LabelKind = "single") -> ExportSource:
    saved, task = tokenizer(), FAMILIES[family].task
    tiny_model(family, vocabulary=len(saved), pad_token_id=0, num_labels=2).save_pretrained(folder)
    saved.save_pretrained(folder)
    labels = ClassLabels(kind, ("a", "b")) if TASKS[task].is_classification else None
    return export_source(family, folder, saved, task=task, labels=labels)


def checks(source: ExportSource, out: Path, quantize: str | None, *, runtime: bool = True) -> dict[str, Check]:
    return {check.name: check for check in hf_model.verify(source, out, options(quantize, runtime=runtime))}


def export(source: ExportSource, out: Path, quantize: str | None) -> dict[str, Check]:
    hf_model.check_supported(source, options(quantize))
    hf_model.write(source, out, options(quantize))
    results = checks(source, out, quantize)
    assert [check for check in results.values() if not check.passed] == []
    return results


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(source: ExportSource, folder: Path, **arguments: Any) -> PreTrainedModel:
    model: PreTrainedModel = TASKS[source.task].auto_class.from_pretrained(folder, **arguments)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_cast_equals_transformers_cast(quantize: str | None, tied: bool, tmp_path: Path):
    source = tiny_source("llama", tmp_path / "base", tie_word_embeddings=tied)
    export(source, tmp_path / "out", quantize)
    dtype = hf_model.DTYPES[quantize or "f32"]
    expected = load(source, source.folder, dtype=dtype).state_dict()
    ours = load(source, tmp_path / "out")
    assert ours.config.dtype == ours.dtype == dtype
    assert ours.config.tie_word_embeddings == tied
    assert ours.generation_config.eos_token_id == source.tokenizer.eos_token_id
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert tensors(tmp_path / "out").keys() == tensors(source.folder).keys()
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_vocab() == source.tokenizer.get_vocab()
    assert saved.chat_template == source.tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert", "bert-tokens", "llama-classifier"])
def test_nf4_weights_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    causal = FAMILIES[family].task == "causal-lm"
    source = tiny_source(family, tmp_path / "base") if causal else classifier(family, tmp_path / "base")
    export(source, tmp_path / "out", "nf4")
    # As in a process that imports transformers alone: it leaves the experts in 16 bits.
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Bnb4BitHfQuantizer)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load(source, source.folder, dtype=torch.bfloat16, quantization_config=four_bits)
    ours, theirs = load(source, tmp_path / "out").state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.endswith(".weight.quant_state.bitsandbytes__nf4") for name in ours)
    # transformers saves the same tensors, except for spaces at the end of some JSON.
    model.save_pretrained(tmp_path / "theirs")
    written, saved = tensors(tmp_path / "out"), tensors(tmp_path / "theirs")
    assert written.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(written[name][: len(value)] if "quant_state" in name else written[name], value), name
        if "quant_state" in name:
            assert json.loads(bytes(written[name].tolist())) == json.loads(bytes(value.tolist()))
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section == json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]


@pytest.mark.slow
def test_the_demo_model_in_four_bits(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first ten of the demo model's thirty layers: real weights and a real vocabulary."""
    monkeypatch.setattr(verify, "MAX_POSITIONS", 6)  # bitsandbytes multiplies slowly on a CPU
    monkeypatch.setattr(verify, "MAX_NEW_TOKENS", 6)
    model = AutoModelForCausalLM.from_pretrained(demo_folder, num_hidden_layers=10, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    source = export_source("demo", tmp_path / "model", tokenizer, prompts=(tuple(prompt),))
    results = export(source, tmp_path / "out", "nf4")
    assert results["tensors"].figures["packed"] == 35_389_440  # all linear layers, not the embeddings
    assert 0 < results["note"].figures["kl"] < 2
    # Linear layers take 1/8 of fp32 and their scales, embeddings half.
    size = (tmp_path / "model" / WEIGHTS_FILE).stat().st_size
    assert (tmp_path / "out" / WEIGHTS_FILE).stat().st_size < 0.31 * size


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "llama-classifier"])
@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_classifiers_of_every_kind(family: str, kind: LabelKind, tmp_path: Path):
    source = classifier(family, tmp_path / "base", kind)
    for quantize in (None, "f16"):
        assert export(source, tmp_path / f"out-{quantize}", quantize)["distribution"].passed


def test_unquantized_weights_of_a_float16_model_keep_their_values(llama: ExportSource, tmp_path: Path):
    export(llama, tmp_path / "half", "f16")
    source = llama.at(tmp_path / "half")
    export(source, tmp_path / "out", "nf4")
    ours, half = tensors(tmp_path / "out"), tensors(tmp_path / "half")
    assert torch.equal(ours["model.embed_tokens.weight"], half["model.embed_tokens.weight"])


def test_large_models_are_sharded(llama: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_model, "MAX_SHARD_BYTES", 50_000)
    for quantize in ("bf16", "nf4"):
        export(llama, tmp_path / quantize, quantize)
        files = list((tmp_path / quantize).glob("*.safetensors"))
        index = json.loads((tmp_path / quantize / "model.safetensors.index.json").read_text())
        assert {path.name for path in files} == set(index["weight_map"].values())
        assert all(path.stat().st_size < 60_000 for path in files)


def with_changed_tensor(llama: ExportSource, folder: Path, name: str, change: Any) -> ExportSource:
    """Return a copy of the llama with one tensor changed."""
    export(llama, folder, None)
    weights = load_file(folder / WEIGHTS_FILE)
    weights[name] = change(weights[name])
    save_file(weights, folder / WEIGHTS_FILE)
    return llama.at(folder)


def test_a_value_too_large_for_the_dtype_is_reported_with_its_tensor(llama: ExportSource, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"

    def enlarge(value: Tensor) -> Tensor:
        value[3, 5] = 70_000
        return value

    source = with_changed_tensor(llama, tmp_path / "large", name, enlarge)
    with pytest.raises(LoraError, match=rf"{name}: 7e\+04 is too large for float16"):
        hf_model.write(source, tmp_path / "out", options("f16"))
    export(source, tmp_path / "wide", "bf16")


@pytest.mark.parametrize("quantize", [None, "f32", "f16", "bf16", "nf4"])
def test_any_difference_fails_the_check(quantize: str | None, llama: ExportSource, tmp_path: Path):
    export(llama, tmp_path / "out", quantize)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        weights = load_file(tmp_path / "out" / WEIGHTS_FILE)
        value, before = weights[name].view(-1), weights[name].clone()
        if value.dtype == torch.uint8:
            value[7] ^= 1
        else:  # the smallest possible difference
            value[7] = torch.nextafter(value[7], torch.tensor(torch.inf, dtype=value.dtype))
        save_file(weights, tmp_path / "out" / WEIGHTS_FILE)
        assert not checks(llama, tmp_path / "out", quantize, runtime=False)["tensors"].passed, name
        weights[name] = before
        save_file(weights, tmp_path / "out" / WEIGHTS_FILE)
    assert checks(llama, tmp_path / "out", quantize, runtime=False)["tensors"].passed
    weights = load_file(tmp_path / "out" / WEIGHTS_FILE)
    save_file({key: value for key, value in weights.items() if "norm" not in key}, tmp_path / "out" / WEIGHTS_FILE)
    assert not checks(llama, tmp_path / "out", quantize, runtime=False)["tensors"].passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "key", "value"),
    [
        ("bf16", "rms_norm_eps", 0.01),
        ("nf4", "rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
        (None, "hidden_act", "gelu"),
    ],
)
def test_a_wrong_config_is_found_by_running_the_model(
    quantize: str | None, key: str, value: Any, llama: ExportSource, tmp_path: Path
):
    export(llama, tmp_path / "out", quantize)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config[key] != value
    file.write_text(json.dumps(config | {key: value}))
    results = checks(llama, tmp_path / "out", quantize)
    assert results["tensors"].passed
    assert not results["distribution"].passed
    assert not results["text"].passed


def test_weights_that_the_cpu_kernels_get_wrong_are_not_run(tmp_path: Path):
    source = tiny_source("llama", tmp_path / "base", intermediate_size=96)
    results = export(source, tmp_path / "out", "nf4")
    assert "not run" in results["note"].found
    assert "distribution" not in results


def test_unsupported_quantizations_and_models_are_refused(llama: ExportSource, tmp_path: Path):
    with pytest.raises(LoraError, match="--quantize q8_0 is not supported") as caught:
        hf_model.check_supported(llama, options("q8_0"))
    assert "--to gguf" in str(caught.value.hint)
    with pytest.raises(LoraError, match="no linear layer"):
        hf_model.check_supported(tiny_source("falcon", tmp_path / "falcon"), options("nf4"))
    export(llama, tmp_path / "packed", "nf4")
    packed = llama.at(tmp_path / "packed")
    with pytest.raises(LoraError, match="quantized already"):
        hf_model.check_supported(packed, options("bf16"))


@pytest.mark.parametrize("quantize", [None, "f16", "nf4"])
def test_the_size_of_the_export_is_known_before(llama: ExportSource, tmp_path: Path, quantize: str | None):
    expected = hf_model.size(llama, options(quantize))
    export(llama, tmp_path / "out", quantize)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 < expected / written <= 1


def test_one_tensor_is_in_memory_at_a_time(llama: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    read, write = hf_model.read_tensor, safetensors_io.ShardFiles.write
    monkeypatch.setattr(hf_model, "read_tensor", lambda stored, files: calls.append("read") or read(stored, files))
    monkeypatch.setattr(
        safetensors_io.ShardFiles,
        "write",
        lambda files, path, data, at: calls.append("write") or write(files, path, data, at),
    )
    hf_model.write(llama, tmp_path / "out", options("bf16"))
    assert calls[0] == "write"  # the header
    assert calls[1:] == ["read", "write"] * len(tensors(tmp_path / "out"))


def test_the_printed_lines_of_python_load_the_model(llama: ExportSource, tmp_path: Path):
    export(llama, tmp_path / "my out", "bf16")
    lines = hf_model.usage(llama, tmp_path / "my out", options("bf16"))
    variables: dict[str, Any] = {}
    exec("\n".join(lines[:3]), variables)
    assert variables["model"].dtype == torch.bfloat16
    assert any(line.startswith("vllm serve ") and "'" in line for line in lines)
