"""An ONNX export equals its model: weights, logits with and without the KV cache, texts, labels."""

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_cli.data.class_labels import ClassLabels
from lora_cli.errors import LoraError
from lora_cli.export.onnx import graph, verify
from lora_cli.export.onnx import model as exporter
from lora_cli.export.source import Check, ExportSource
from lora_cli.model.tasks import TASKS
from tests.export.sources import export_source, options, tiny_source
from tests.inputs.tiny_tokenizers import build_encoder
from tests.model import zoo
from tests.model.families import FAMILIES, LABELS, config_of

pytestmark = pytest.mark.slow

# Windows are shorter than the prompts.
WINDOW: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3": {"sliding_window": 8, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "falcon", "falcon-40b", "starcoder2",
    "smollm3", "granite", "olmo2",
)  # fmt: skip


class Export(NamedTuple):
    """A finished export: its source and its folder."""

    source: ExportSource
    out: Path

    def checks(self, *, runtime: bool = True) -> dict[str, Check]:
        """Return the results of `verify` by name."""
        return {check.name: check for check in exporter.verify(self.source, self.out, options(runtime=runtime))}


def export(source: ExportSource, out: Path) -> Export:
    exporter.check_supported(source, options())
    exporter.write(source, out, options())
    return Export(source, out)


def classifier(
    family: str, folder: Path, *, task: str | None = None, labels: ClassLabels | None = LABELS, **more: Any
) -> ExportSource:
    """Save a tiny classifier with nonzero biases to `folder`."""
    entry = FAMILIES[family]._replace(task=task) if task else FAMILIES[family]
    tokenizer = build_encoder("roberta" if family == "roberta" else "bert")
    config = config_of(entry)
    config.update({"vocab_size": len(tokenizer), "num_labels": len((labels or LABELS).names), **more})
    torch.manual_seed(0)
    model = TASKS[entry.task].auto_class.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return export_source(family, folder, tokenizer, task=entry.task, labels=labels)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A decoder with two layers, grouped-query attention and tied embeddings; it never generates EOS."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("onnx")
    return export(tiny_source("llama", folder / "model", tie_word_embeddings=True), folder / "out")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A classifier with one layer, two token types and three labels."""
    folder = tmp_path_factory.mktemp("onnx")
    source = classifier("bert", folder / "model", num_hidden_layers=1)
    return export(source, folder / "out")


def change_weight(exported: Export, name: str, edit: Callable[[np.ndarray], None], out: Path) -> Export:
    """Return a copy of an export in `out`, with one weight edited in place by `edit`."""
    out.mkdir(exist_ok=True)
    model = onnx.load(exported.out / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(weight).copy()
    edit(values)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return exported._replace(out=out)


def test_a_decoder_equals_its_model(llama: Export):
    checks = llama.checks()
    assert all(check.passed for check in checks.values()), checks
    model = AutoModelForCausalLM.from_pretrained(llama.source.folder)
    assert checks["tensors"].figures["equal"] == len(list(model.parameters()))
    assert checks["logits"].figures["apart"] < 1e-5
    assert checks["text"].figures["same"] == len(llama.source.prompts)


def test_names_are_those_of_onnxruntimes_own_tools(llama: Export):
    session = onnxruntime.InferenceSession(llama.out / "model.onnx", providers=["CPUExecutionProvider"])
    cache = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    inputs = {value.name: (value.shape, value.type) for value in session.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in cache)]
    assert inputs["attention_mask"] == (["batch_size", "total_sequence_length"], "tensor(int64)")
    assert inputs["past_key_values.1.key"] == (["batch_size", 2, "past_sequence_length", 16], "tensor(float)")
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.{name}" for name in cache)]
    usage = "\n".join(exporter.usage(llama.source, llama.out, options()))
    assert all(name in usage for name in ("model.onnx", "position_ids", "past_key_values.1.value", "present.0.key"))


@pytest.mark.parametrize(("rows", "pieces"), [(1, (1, 1, 1)), (3, (9, 1, 4)), (2, (14,))])
def test_any_batch_size_in_any_pieces(llama: Export, rows: int, pieces: tuple[int, ...]):
    """In plain onnxruntime, without `verify`. Tracers treat one position, one row and an empty cache as fixed sizes."""
    session = onnxruntime.InferenceSession(llama.out / "model.onnx", providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(llama.source.folder)
    ids = torch.randint(3, 300, (rows, sum(pieces)), generator=torch.Generator().manual_seed(0))
    past = [np.zeros((rows, 2, 0, 16), np.float32)] * 4
    names = [value.name for value in session.get_inputs()[3:]]
    outputs, read = [], 0
    for piece in pieces:
        inputs = {
            "input_ids": ids[:, read : read + piece].numpy(),
            "attention_mask": np.ones((rows, read + piece), np.int64),
            "position_ids": np.tile(np.arange(read, read + piece), (rows, 1)),
        }
        logits, *past = session.run(None, inputs | dict(zip(names, past, strict=True)))
        outputs.append(torch.from_numpy(logits))
        read += piece
    with torch.no_grad():
        assert zoo.relative(torch.cat(outputs, dim=1), model(ids).logits) < 1e-5
    assert all(tensor.shape == (rows, 2, read, 16) for tensor in past)


def test_the_folder_is_complete(llama: Export):
    names = {file.name for file in llama.out.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"}
    assert AutoConfig.from_pretrained(llama.out).dtype == torch.float32
    text = "<|im_start|>user\nHello<|im_end|>"
    assert AutoTokenizer.from_pretrained(llama.out)(text) == llama.source.tokenizer(text)
    # A tied weight is stored once, and the graph contains no paths of the machine that wrote it.
    model = AutoModelForCausalLM.from_pretrained(llama.source.folder)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size <= sum(file.stat().st_size for file in llama.out.glob("model.onnx*")) < size + (1 << 16)
    assert b"site-packages" not in (llama.out / "model.onnx").read_bytes()


def test_a_changed_weight_is_found(llama: Export, tmp_path: Path):
    def negate(values: np.ndarray) -> None:
        values[3] *= -1

    changed = change_weight(llama, "model.layers.0.self_attn.q_proj.weight", negate, tmp_path)
    checks = changed.checks()
    assert not checks["tensors"].passed
    assert "model.layers.0.self_attn.q_proj.weight" in checks["tensors"].found
    assert not checks["logits"].passed
    assert list(changed.checks(runtime=False)) == ["tensors"]


def test_weights_are_checked_without_onnxruntime(llama: Export, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    importlib.reload(verify)
    assert llama.checks(runtime=False)["tensors"].passed


def test_a_weight_off_by_one_bit_is_found(llama: Export, tmp_path: Path):
    def nudge(values: np.ndarray) -> None:
        values[5] = np.nextafter(values[5], 2)

    checks = change_weight(llama, "model.norm.weight", nudge, tmp_path).checks()
    assert not checks["tensors"].passed
    assert checks["logits"].passed
    assert checks["text"].passed


def test_a_different_text_is_found(llama: Export, tmp_path: Path):
    """The tokens that differ are not equally likely."""

    def shift(values: np.ndarray) -> None:
        values[:] = np.roll(values, 1, axis=0)

    checks = change_weight(llama, "lm_head.weight", shift, tmp_path).checks()
    assert not checks["logits"].passed
    assert not checks["text"].passed


def test_a_truncated_file_fails_the_checks(llama: Export, tmp_path: Path):
    data = (llama.out / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx").write_bytes((llama.out / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.data").write_bytes(data[: len(data) // 2])
    checks = llama._replace(out=tmp_path).checks()
    assert not checks["tensors"].passed
    assert not checks["logits"].passed


def test_ties_of_two_tokens_are_counted_and_pass(tmp_path: Path):
    """The second half of the vocabulary equals the first; the file prefers the second by less than rounding."""
    source = tiny_source("gpt2", tmp_path / "model", n_layer=1)
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    half = len(source.tokenizer) // 2
    with torch.no_grad():
        model.lm_head.weight[half : 2 * half] = model.lm_head.weight[:half]
    model.save_pretrained(source.folder)
    exported = export(source, tmp_path / "out")
    checks = exported.checks()
    assert all(check.passed for check in checks.values()), checks
    assert checks["text"].figures["ties"] == 0

    def prefer(values: np.ndarray) -> None:
        values[half : 2 * half] *= 1 + 1e-6

    checks = change_weight(exported, "lm_head.weight", prefer, tmp_path / "changed").checks()
    assert checks["text"].figures["ties"] > 0
    assert checks["text"].passed
    assert checks["logits"].passed
    assert not checks["tensors"].passed


@pytest.mark.parametrize("family", DECODERS)
def test_the_traced_module_equals_the_model(family: str, tmp_path: Path):
    """For every family, in torch: in pieces and padded on the left, against transformers' own masks and caches."""
    torch.manual_seed(0)
    source = tiny_source(family, tmp_path, **WINDOW.get(family, {}))
    model, traced = exporter.load_fp32(source), exporter.load_fp32(source, attention="eager")
    signature = graph.graph_signature(traced, "causal-lm")
    flat = graph.FlatCacheModel(traced)
    ids = torch.randint(3, 300, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    cache = [torch.zeros(2, *value.shape[1:2], 0, *value.shape[3:]) for value in signature.cache]
    outputs, read = [], 0
    for piece in (11, 1, 8):
        positions = slice(read, read + piece)
        inputs = {"input_ids": ids[:, positions], "attention_mask": mask[:, : read + piece]}
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, positions]
        with torch.no_grad():
            logits, *cache = flat(inputs, cache)
        outputs.append(logits)
        read += piece
    with torch.no_grad():
        expected = [model(ids[:1]).logits[0], model(ids[1:, 6:]).logits[0]]
    batch = torch.cat(outputs, dim=1)
    assert zoo.relative(batch[0], expected[0]) < 1e-5
    assert zoo.relative(batch[1, 6:], expected[1]) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "phi3", "falcon"])
def test_other_families_equal_their_models(family: str, tmp_path: Path):
    """Sliding windows, softcapping and tied embeddings; fused projections; multi-query attention."""
    small = WINDOW.get(family, {"num_hidden_layers": 1})
    exported = export(tiny_source(family, tmp_path / "model", **small), tmp_path / "out")
    assert max(map(len, exported.source.prompts)) > 8
    checks = exported.checks()
    assert list(checks) == ["tensors", "logits", "text"]
    assert all(check.passed for check in checks.values()), checks


def test_a_classifier_equals_its_model(bert: Export):
    checks = bert.checks()
    assert list(checks) == ["tensors", "logits", "labels"]
    assert all(check.passed for check in checks.values()), checks
    inputs = [value.name for value in onnx.load(bert.out / "model.onnx", load_external_data=False).graph.input]
    assert inputs == ["input_ids", "attention_mask", "token_type_ids"]
    assert json.loads((bert.out / "config.json").read_text())["id2label"]["0"] == LABELS.names[0]


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_a_changed_head_is_found(kind: Any, bert: Export, tmp_path: Path):
    def negate(values: np.ndarray) -> None:
        values *= -1

    labels = ClassLabels(kind, LABELS.names)
    unchanged = bert._replace(source=bert.source._replace(base=bert.source.base._replace(labels=labels)))
    checks = unchanged.checks()
    assert all(check.passed for check in checks.values()), checks
    checks = change_weight(unchanged, "classifier.weight", negate, tmp_path).checks()
    assert list(checks) == ["tensors", "logits"] + (["labels"] if kind != "regression" else [])
    assert not any(check.passed for check in checks.values())


@pytest.mark.parametrize(("family", "task"), [("llama-classifier", "seq-cls"), ("distilbert", "token-cls")])
def test_other_classifiers_equal_their_models(family: str, task: str, tmp_path: Path):
    exported = export(classifier(family, tmp_path / "model", task=task, num_hidden_layers=1), tmp_path / "out")
    checks = exported.checks()
    assert all(check.passed for check in checks.values()), checks
    assert checks["labels"].figures["rows"] == (5 if task == "seq-cls" else 5 + 17 + 40 + 40 + 20)
    inputs = [value.name for value in onnx.load(exported.out / "model.onnx", load_external_data=False).graph.input]
    assert inputs == ["input_ids", "attention_mask"]


def output_state() -> tuple[object, ...]:
    """Return what the exporter's silence changes: disabled log levels, warning filters, the two streams."""
    return logging.root.manager.disable, list(warnings.filters), sys.stdout, sys.stderr


def test_the_exporter_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    source = classifier("distilbert", tmp_path / "model", num_hidden_layers=1)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = output_state()
        assert all(check.passed for check in export(source, tmp_path / "out").checks().values())
        assert output_state() == before
    assert capfd.readouterr() == ("", "")
    assert not warned
    assert not [record for record in caplog.records if record.name != "torch.__trace"]  # internal to torch


def test_an_untraceable_model_gives_a_one_line_error(tmp_path: Path):
    class DataDependent(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            if float(output.logits.sum()) > 0:  # a branch that depends on data
                output.logits *= 2
            return output

    model = DataDependent(LlamaConfig(**{**zoo.COMMON, "num_hidden_layers": 1}))
    before = output_state()
    with pytest.raises(LoraError, match=r"trace this llama model: .*data-dependent") as caught:
        graph.trace(model, graph.graph_signature(model, "causal-lm"), tmp_path / "model.onnx")
    assert output_state() == before
    assert "\n" not in caught.value.message


def test_an_unsupported_cache_is_refused():
    with pytest.raises(LoraError, match="cache of a mamba"):
        graph.graph_signature(zoo.make("mamba"), "causal-lm")


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("mamba", {}, "state of a mamba model"),
        ("mixtral", {}, "mixture of experts"),
        ("falcon-alibi", {}, "ALiBi"),
        ("t5", {}, "encoder-decoder"),
        ("bart-classifier", {}, "encoder-decoder"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "recomputes"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantized"),
    ],
)
def test_unsupported_models_are_refused_before_any_weight_is_read(
    family: str, more: dict[str, Any], reason: str, tmp_path: Path
):
    entry = FAMILIES[family]._replace(options={**FAMILIES[family].options, **more})
    tokenizer: Any = None  # refused before the tokenizer is used
    source = export_source(family, tmp_path / "missing", tokenizer, config=config_of(entry), task=entry.task)
    with pytest.raises(LoraError, match=reason) as caught:
        exporter.check_supported(source, options())
    assert "safetensors" in str(caught.value.hint) or "16-bit" in str(caught.value.hint)


def test_other_dtypes_than_fp32_are_refused(llama: Export):
    with pytest.raises(LoraError, match="fp32") as caught:
        exporter.check_supported(llama.source, options("q8_0"))
    assert "gguf" in str(caught.value.hint)


def test_a_real_model(demo_folder: Path, tmp_path: Path):
    """The first of the demo model's thirty layers: real weights and a real vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(demo_folder, num_hidden_layers=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    source = export_source("demo", tmp_path / "model", tokenizer, prompts=(tuple(prompt),))
    checks = export(source, tmp_path / "out").checks()
    assert all(check.passed for check in checks.values()), checks
