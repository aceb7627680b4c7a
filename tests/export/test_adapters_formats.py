"""Export of adapter folders: PEFT loads the trained tensors, and vLLM's arithmetic gives PEFT's logits."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.data.class_labels import save_labels
from lora_cli.errors import LoraError
from lora_cli.export.hf import peft_adapter, vllm_adapter
from lora_cli.export.source import ExportSource
from lora_cli.model import save_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.trained_on import TrainedOn, write_trained_on
from tests.export.sources import export_source, options, tiny_model, tiny_source, tokenizer
from tests.model import zoo
from tests.model.families import LABELS
from tests.model.zoo import METHODS, relative

IDS = torch.tensor([[5, 9, 30, 2, 77, 41, 8, 60]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    return tiny_source("llama", tmp_path_factory.mktemp("llama") / "base model")


def with_adapter(source: ExportSource, folder: Path, **adapter_options: Any) -> ExportSource:
    """Return `source` with an adapter that is saved to `folder`, as training saves it."""
    adapted = zoo.adapted(tiny_model(source.name, vocabulary=source.config.vocab_size), **adapter_options)
    return save(source, adapted, folder)


def save(source: ExportSource, adapted: PeftModel, folder: Path) -> ExportSource:
    save_adapter.save_adapter(adapted, folder, base=str(source.folder), revision=None)
    return opened(source, folder)


def opened(source: ExportSource, folder: Path) -> ExportSource:
    """Return `source` with the adapter in `folder`, and its base named by its path, as `lora export` opens it."""
    return source._replace(adapter=open_adapter(folder), base=source.base._replace(name=str(source.folder)))


def failed_checks(module: Any, source: ExportSource, out: Path) -> set[str]:
    return {check.name for check in module.verify(source, out, options()) if not check.passed}


def export(module: Any, source: ExportSource, out: Path) -> Path:
    module.check_supported(source, options())
    module.write(source, out, options())
    assert failed_checks(module, source, out) == set()
    return out


def damage(out: Path, *, key: str) -> None:
    tensors = load_file(out / save_adapter.ADAPTER_WEIGHTS)
    name = next(name for name in sorted(tensors) if key in name)
    tensors[name].view(-1)[-1] += 0.25
    save_file(tensors, out / save_adapter.ADAPTER_WEIGHTS)


@torch.no_grad()
def peft_logits(source: ExportSource) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(source.folder)
    return PeftModel.from_pretrained(base, str(source.adapter.folder)).eval()(IDS).logits


@torch.no_grad()
def vllm_logits(source: ExportSource, out: Path) -> Tensor:
    """Return logits by vLLM's arithmetic: one scale from the configuration for every update; patterns are ignored."""
    config = json.loads((out / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    base = AutoModelForCausalLM.from_pretrained(source.folder)
    tensors = load_file(out / save_adapter.ADAPTER_WEIGHTS)
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            base.get_parameter(f"{layer}.weight").data += scale * (b.float() @ a.float())
    return base.eval()(IDS).logits


PATTERNS = {"alpha_pattern": {"q_proj": 3.0}, "rank_pattern": {"up_proj": 6, "layers.0.mlp.down_proj": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter_options",
    [
        {},
        {"method": "rslora"},
        {"alpha_pattern": {"q_proj": 2.0}},
        {"rank_pattern": {"up_proj": 2}},
        PATTERNS,
        {"method": "rslora", **PATTERNS},
        {"target_modules": ["q_proj", "lm_head"]},
        {"method": "scaled"},
        {"method": "pissa"},
    ],
    ids=["lora", "rslora", "alphas", "ranks", "patterns", "rslora-patterns", "head", "scaled", "pissa"],
)
def test_vllm_computes_the_same_logits_as_peft(adapter_options: dict[str, Any], llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter", **adapter_options)
    out = export(vllm_adapter, source, tmp_path / "out")
    expected = peft_logits(source)
    assert relative(vllm_logits(source, out), expected) < 2e-5
    patterned = "alpha_pattern" in adapter_options or "rank_pattern" in adapter_options
    assert (relative(vllm_logits(source, tmp_path / "adapter"), expected) > 1e-3) == patterned
    # PEFT computes the same from the rewritten adapter.
    assert relative(peft_logits(opened(source, out)), expected) < 2e-5


def test_bfloat16_factors_are_not_rounded_when_scales_are_merged_into_b(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter", alpha_pattern={"q_proj": 3, "k_proj": 4})
    halves = {
        key: value.bfloat16() for key, value in load_file(tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS).items()
    }
    save_file(halves, tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    out = export(vllm_adapter, opened(source, tmp_path / "adapter"), tmp_path / "out")
    in_fp32 = {
        key for key, value in load_file(out / save_adapter.ADAPTER_WEIGHTS).items() if value.dtype == torch.float32
    }
    assert in_fp32 == {key for key in halves if "q_proj.lora_B" in key}  # 4/8 is exact in bfloat16, 3/8 is not


def test_any_difference_fails_a_check(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "plain")
    for number, key in enumerate(("lora_A", "lora_B")):
        vllm_adapter.write(source, tmp_path / f"out{number}", options())
        damage(tmp_path / f"out{number}", key=key)
        assert failed_checks(vllm_adapter, source, tmp_path / f"out{number}") == {"tensors", "peft"}
    uneven = with_adapter(llama, tmp_path / "uneven", **PATTERNS)
    for number, key in enumerate(("lora_A", "lora_B"), start=2):
        vllm_adapter.write(uneven, tmp_path / f"out{number}", options())
        damage(tmp_path / f"out{number}", key=key)
        assert failed_checks(vllm_adapter, uneven, tmp_path / f"out{number}") == {"updates"}
    vllm_adapter.write(uneven, tmp_path / "out4", options())
    file = tmp_path / "out4" / "adapter_config.json"
    file.write_text(file.read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"v_proj": 1}'))
    assert failed_checks(vllm_adapter, uneven, tmp_path / "out4") == {"updates", "scales"}


@pytest.mark.parametrize(
    ("adapter_options", "message"),
    [
        ({"method": "dora"}, "DoRA"),
        ({"method": "loha"}, "the method loha"),
        ({"method": "adalora"}, "the method adalora"),
        ({"method": "prompt"}, "the method prompt tuning"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(lm_head\)"),
        ({"trainable_tokens": ["yes", "no"]}, "trained tokens"),
        ({"rank": 513, "target_modules": ["q_proj"]}, "rank 513"),
    ],
)
def test_adapters_that_vllm_does_not_support_are_refused(
    adapter_options: dict[str, Any], message: str, llama: ExportSource, tmp_path: Path
):
    source = with_adapter(llama, tmp_path / "adapter", **adapter_options)
    with pytest.raises(LoraError, match=message) as caught:
        vllm_adapter.check_supported(source, options())
    assert "safetensors" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "adapter_options", "message"),
    [
        ("gpt2", {}, "GPT2LMHeadModel is not among"),
        (
            "mixtral",
            {},
            r"target_parameters \(model\.layers\.0\.[^,]*, model\.layers\.0\.[^,]*, model\.layers\.1\..* and 1 more\)",
        ),
        ("qwen2", {"target_modules": ["lm_head"]}, "lm_head is adapted"),
    ],
)
def test_bases_that_vllm_does_not_support_are_refused(
    family: str, adapter_options: dict[str, Any], message: str, tmp_path: Path
):
    source = with_adapter(tiny_source(family, tmp_path / "base"), tmp_path / "adapter", **adapter_options)
    with pytest.raises(LoraError, match=message):
        vllm_adapter.check_supported(source, options())
    export(peft_adapter, source, tmp_path / "out")


def test_tasks_and_unknown_tensors_are_refused(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter")
    with pytest.raises(LoraError, match="seq-cls adapter"):
        vllm_adapter.check_supported(source._replace(base=source.base._replace(task="seq-cls")), options())
    tensors = load_file(tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(llama.config.vocab_size, 64)}
    save_file(tensors | embeddings, tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    with pytest.raises(LoraError, match=r"vLLM does not load base_model\.model\.model\.embed_tokens\.weight"):
        vllm_adapter.check_supported(opened(source, tmp_path / "adapter"), options())
    for module in (vllm_adapter, peft_adapter):
        with pytest.raises(LoraError, match="--quantize f16"):
            module.check_supported(with_adapter(llama, tmp_path / "other"), options("f16"))


@pytest.mark.parametrize(("rank", "largest"), [(1, "1"), (4, "8"), (16, "16"), (17, "32"), (130, "256"), (300, "320")])
def test_the_command_has_an_allowed_rank(rank: int, largest: str, llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama._replace(name="llama"), tmp_path / "adapter", rank=rank, target_modules=["q_proj"])
    lines = vllm_adapter.usage(source._replace(name="runs/my run/adapter"), tmp_path / "out", options())
    command = shlex.split(lines[0])
    assert command[:3] == ["vllm", "serve", str(source.folder)]
    assert command[command.index("--max-lora-rank") + 1] == largest
    assert command[command.index("--lora-modules") + 1] == f"my-run={tmp_path / 'out'}"
    assert "--tokenizer" not in command
    request = json.loads(shlex.split(lines[1])[-1])
    assert request["model"] == "my-run"
    assert request["messages"]


def test_another_tokenizer_and_a_quantized_base_are_reported(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter")
    other = tokenizer()
    other.chat_template = "{{ messages }}"
    record = TrainedOn(None, "0" * 64, "LlamaForCausalLM", "bfloat16", {"bits": 4, "type": "nf4"})
    write_trained_on(record, tmp_path / "adapter")
    source = opened(source, tmp_path / "adapter")
    lines = vllm_adapter.usage(source._replace(base=source.base._replace(tokenizer=other)), tmp_path / "out", options())
    assert "--tokenizer" in shlex.split(lines[0])
    assert any("nf4" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_every_method(method: str, llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter", method=method)
    out = export(peft_adapter, source, tmp_path / "out")
    damage(out, key="")
    assert failed_checks(peft_adapter, source, out) == {"tensors", "peft"}


def test_the_printed_lines_of_python_load_the_adapted_model(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter")
    lines = peft_adapter.usage(source, export(peft_adapter, source, tmp_path / "out"), options())
    assert any(llama.folder.name in line and line.startswith("note:") for line in lines)
    assert torch.equal(logits_of_lines(lines), peft_logits(source))
    assert not torch.equal(logits_of_lines(lines), AutoModelForCausalLM.from_pretrained(llama.folder)(IDS).logits)


@torch.no_grad()
def logits_of_lines(lines: list[str]) -> Tensor:
    variables: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith("note:")), variables)
    assert variables["tokenizer"].chat_template
    return variables["model"].eval()(IDS).logits


def test_a_classifier_and_its_labels(tmp_path: Path):
    saved = tokenizer()
    base = tiny_model("bert", vocabulary=len(saved), num_labels=3, pad_token_id=0)
    base.save_pretrained(tmp_path / "base")
    context = AdapterContext(task="seq-cls", heads=("classifier",))
    adapted = zoo.adapted(base, context=context, target_modules=["query", "value"])
    source = save(
        export_source("bert", tmp_path / "base", saved, task="seq-cls", labels=LABELS), adapted, tmp_path / "adapter"
    )
    lines = peft_adapter.usage(source, export(peft_adapter, source, tmp_path / "out"), options())
    with torch.no_grad():
        assert relative(logits_of_lines(lines), adapted.eval()(IDS).logits) < 1e-6


def test_only_files_of_the_adapter_are_copied(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter")
    for name in ("optimizer.pt", "trainer_state.json", "README.md"):
        (tmp_path / "adapter" / name).write_text("{}")
    save_labels(LABELS, tmp_path / "adapter")
    out = export(peft_adapter, source, tmp_path / "out")
    copied = {path.name for path in out.iterdir()}
    assert copied >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "labels.json"}
    assert not copied & {"optimizer.pt", "trainer_state.json"}


def test_an_adapter_of_another_base_is_refused(llama: ExportSource, tmp_path: Path):
    source = with_adapter(llama, tmp_path / "adapter")
    other = tiny_source("llama", tmp_path / "other", hidden_size=32)
    for module in (peft_adapter, vllm_adapter):
        with pytest.raises(LoraError, match="does not fit"):
            module.check_supported(other._replace(adapter=source.adapter), options())
