"""Adapters as folders: PEFT has in them what was trained, and vLLM's arithmetic over them is PEFT's."""

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

from lora_cli.errors import LoraError
from lora_cli.export.hf import peft_adapter, vllm_adapter
from lora_cli.export.source import ExportSource
from lora_cli.model import save_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.trained_on import TrainedOn, write_trained_on
from tests.export.sources import export_source, model, options, subject, tokenizer
from tests.model import zoo
from tests.model.families import LABELS
from tests.model.zoo import METHODS, relative

IDS = torch.tensor([[5, 9, 30, 2, 77, 41, 8, 60]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    return subject("llama", tmp_path_factory.mktemp("llama") / "base model")


def with_adapter(found: ExportSource, folder: Path, **given: Any) -> ExportSource:
    """`found` with an adapter, as a run leaves it: in RUN/adapter."""
    made = zoo.adapted(model(found.name, vocabulary=found.config.vocab_size), **given)
    return saved(found, made, folder)


def saved(found: ExportSource, made: PeftModel, folder: Path) -> ExportSource:
    save_adapter.save_adapter(made, folder, base=str(found.folder), revision=None)
    return found._replace(adapter=folder)


def failed(module: Any, found: ExportSource, out: Path) -> set[str]:
    return {check.name for check in module.prove(found, out, options()) if not check.passed}


def exported(module: Any, found: ExportSource, out: Path) -> Path:
    module.refuse(found, options())
    module.write(found, out, options())
    assert failed(module, found, out) == set()
    return out


def damage(out: Path, *, key: str) -> None:
    tensors = load_file(out / save_adapter.ADAPTER_WEIGHTS)
    name = next(name for name in sorted(tensors) if key in name)
    tensors[name].view(-1)[-1] += 0.25
    save_file(tensors, out / save_adapter.ADAPTER_WEIGHTS)


@torch.no_grad()
def by_peft(found: ExportSource) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(found.folder)
    return PeftModel.from_pretrained(base, str(found.adapter)).eval()(IDS).logits


@torch.no_grad()
def by_vllm(found: ExportSource, out: Path) -> Tensor:
    """What vLLM makes of a folder: every update times one number from the configuration, patterns or not."""
    config = json.loads((out / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    base = AutoModelForCausalLM.from_pretrained(found.folder)
    tensors = load_file(out / save_adapter.ADAPTER_WEIGHTS)
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            base.get_parameter(f"{layer}.weight").data += scale * (b.float() @ a.float())
    return base.eval()(IDS).logits


PATTERNS = {"alpha_pattern": {"q_proj": 3.0}, "rank_pattern": {"up_proj": 6, "layers.0.mlp.down_proj": 2}}


@pytest.mark.parametrize(
    "given",
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
def test_vllm_computes_what_peft_does(given: dict[str, Any], llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter", **given)
    out = exported(vllm_adapter, found, tmp_path / "out")
    expected = by_peft(found)
    assert relative(by_vllm(found, out), expected) < 2e-5
    patterned = "alpha_pattern" in given or "rank_pattern" in given
    assert (relative(by_vllm(found, tmp_path / "adapter"), expected) > 1e-3) == patterned
    # What is written is as good for PEFT.
    assert relative(by_peft(found._replace(adapter=out)), expected) < 2e-5


def test_narrow_factors_lose_nothing_where_scales_are_folded(llama: ExportSource, tmp_path: Path):
    made = zoo.adapted(model("llama", vocabulary=llama.config.vocab_size), alpha_pattern={"q_proj": 3, "k_proj": 4})
    found = saved(llama, made, tmp_path / "adapter")
    narrow = {
        key: value.bfloat16() for key, value in load_file(tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS).items()
    }
    save_file(narrow, tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    out = exported(vllm_adapter, found, tmp_path / "out")
    wide = {key for key, value in load_file(out / save_adapter.ADAPTER_WEIGHTS).items() if value.dtype == torch.float32}
    assert wide == {key for key in narrow if "q_proj.lora_B" in key}  # 4/8 is exact in bfloat16, 3/8 is not


def test_what_differs_is_found_out(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "plain")
    for number, key in enumerate(("lora_A", "lora_B")):
        vllm_adapter.write(found, tmp_path / f"out{number}", options())
        damage(tmp_path / f"out{number}", key=key)
        assert failed(vllm_adapter, found, tmp_path / f"out{number}") == {"tensors", "peft"}
    uneven = with_adapter(llama, tmp_path / "uneven", **PATTERNS)
    for number, key in enumerate(("lora_A", "lora_B"), start=2):
        vllm_adapter.write(uneven, tmp_path / f"out{number}", options())
        damage(tmp_path / f"out{number}", key=key)
        assert failed(vllm_adapter, uneven, tmp_path / f"out{number}") == {"updates"}
    vllm_adapter.write(uneven, tmp_path / "out4", options())
    file = tmp_path / "out4" / "adapter_config.json"
    file.write_text(file.read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"v_proj": 1}'))
    assert failed(vllm_adapter, uneven, tmp_path / "out4") == {"updates", "scales"}


@pytest.mark.parametrize(
    ("given", "says"),
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
def test_what_vllm_does_not_take_is_refused(given: dict[str, Any], says: str, llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter", **given)
    with pytest.raises(LoraError, match=says) as caught:
        vllm_adapter.refuse(found, options())
    assert "safetensors" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("gpt2", {}, "GPT2LMHeadModel is none of"),
        ("mixtral", {}, "target_parameters"),
        ("qwen2", {"target_modules": ["lm_head"]}, "lm_head is adapted"),
    ],
)
def test_bases_are_held_against_what_vllm_adapts(family: str, given: dict[str, Any], says: str, tmp_path: Path):
    found = with_adapter(subject(family, tmp_path / "base"), tmp_path / "adapter", **given)
    with pytest.raises(LoraError, match=says):
        vllm_adapter.refuse(found, options())
    exported(peft_adapter, found, tmp_path / "out")


def test_tasks_and_strange_tensors_are_refused(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter")
    with pytest.raises(LoraError, match="seq-cls adapter"):
        vllm_adapter.refuse(found._replace(base=found.base._replace(task="seq-cls")), options())
    tensors = load_file(tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(llama.config.vocab_size, 64)}
    save_file(tensors | embeddings, tmp_path / "adapter" / save_adapter.ADAPTER_WEIGHTS)
    with pytest.raises(LoraError, match=r"no place for base_model\.model\.model\.embed_tokens\.weight"):
        vllm_adapter.refuse(found, options())
    for module in (vllm_adapter, peft_adapter):
        with pytest.raises(LoraError, match="--quantize f16"):
            module.refuse(with_adapter(llama, tmp_path / "other"), options("f16"))
        (tmp_path / "other" / save_adapter.ADAPTER_WEIGHTS).rename(tmp_path / "other" / "adapter_model.bin")
        with pytest.raises(LoraError, match=r"only adapter_model\.bin"):
            module.refuse(found._replace(adapter=tmp_path / "other"), options())


@pytest.mark.parametrize(("rank", "largest"), [(1, "1"), (4, "8"), (16, "16"), (17, "32"), (130, "256"), (300, "320")])
def test_the_command_serves_any_rank(rank: int, largest: str, llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama._replace(name="llama"), tmp_path / "adapter", rank=rank, target_modules=["q_proj"])
    lines = vllm_adapter.usage(found._replace(name="runs/my run/adapter"), tmp_path / "out", options())
    words = shlex.split(lines[0])
    assert words[:3] == ["vllm", "serve", str(found.folder)]
    assert words[words.index("--max-lora-rank") + 1] == largest
    assert words[words.index("--lora-modules") + 1] == f"my-run={tmp_path / 'out'}"
    assert "--tokenizer" not in words
    asked = json.loads(shlex.split(lines[1])[-1])
    assert asked["model"] == "my-run"
    assert asked["messages"]


def test_another_tokenizer_and_a_quantised_base_are_told(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter")
    words = tokenizer()
    words.chat_template = "{{ messages }}"
    write_trained_on(
        TrainedOn(None, "0", "LlamaForCausalLM", "bfloat16", {"bits": 4, "type": "nf4"}), tmp_path / "adapter"
    )
    lines = vllm_adapter.usage(found._replace(base=found.base._replace(tokenizer=words)), tmp_path / "out", options())
    assert "--tokenizer" in shlex.split(lines[0])
    assert any("nf4" in line for line in lines)


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_every_method(method: str, llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter", method=method)
    out = exported(peft_adapter, found, tmp_path / "out")
    damage(out, key="")
    assert failed(peft_adapter, found, out) == {"tensors", "peft"}


def test_the_lines_of_python_give_the_adapted_model(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter")
    lines = peft_adapter.usage(found, exported(peft_adapter, found, tmp_path / "out"), options())
    assert any(str(llama.folder) in line and line.startswith("note:") for line in lines)
    assert torch.equal(logits_of(lines), by_peft(found))
    assert not torch.equal(logits_of(lines), AutoModelForCausalLM.from_pretrained(llama.folder)(IDS).logits)


@torch.no_grad()
def logits_of(lines: list[str]) -> Tensor:
    space: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith("note:")), space)
    assert space["tokenizer"].chat_template
    return space["model"].eval()(IDS).logits


def test_a_classifier_and_its_labels(tmp_path: Path):
    words = tokenizer()
    base = model("bert", vocabulary=len(words), num_labels=3, pad_token_id=0)
    base.save_pretrained(tmp_path / "base")
    context = AdapterContext(task="seq-cls", heads=("classifier",))
    made = zoo.adapted(base, context=context, target_modules=["query", "value"])
    found = saved(
        export_source("bert", tmp_path / "base", words, task="seq-cls", labels=LABELS), made, tmp_path / "adapter"
    )
    lines = peft_adapter.usage(found, exported(peft_adapter, found, tmp_path / "out"), options())
    with torch.no_grad():
        assert relative(logits_of(lines), made.eval()(IDS).logits) < 1e-6


def test_only_what_belongs_to_an_adapter_is_copied(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter")
    for name in ("optimizer.pt", "trainer_state.json", "README.md", "labels.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    out = exported(peft_adapter, found, tmp_path / "out")
    kept = {path.name for path in out.iterdir()}
    assert kept >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "labels.json"}
    assert not kept & {"optimizer.pt", "trainer_state.json"}


def test_an_adapter_of_another_base_is_refused(llama: ExportSource, tmp_path: Path):
    found = with_adapter(llama, tmp_path / "adapter")
    other = subject("llama", tmp_path / "other", hidden_size=32)
    for module in (peft_adapter, vllm_adapter):
        with pytest.raises(LoraError, match="does not fit"):
            module.refuse(other._replace(adapter=found.adapter), options())
