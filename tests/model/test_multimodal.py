"""Text training of multimodal bases: for each family, the decoder alone is adapted, packed, saved, merged and asked."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import collate_packed, collate_padded
from lora_cli.errors import LoraError
from lora_cli.model import (
    attach_adapter,
    fp32_weights,
    multimodal,
    safetensors_io,
    save_adapter,
    select_attention,
    tasks,
)
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.loss import LossFunction
from lora_cli.model.quantize import check_cpu_widths
from lora_cli.model.target_modules import linear_layers, resolve_target_modules
from lora_cli.recipe.schema import AdapterSpec, TrainingSpec
from lora_cli.training.loop import fit
from lora_cli.training.optimizer import make_optimizer
from tests.merging.test_stream import merge
from tests.model import multimodal_families, zoo
from tests.model.multimodal_families import MULTIMODAL, Multimodal
from tests.support.checkpoints import CPU, checkpoint

LENGTHS = [12, 30, 7, 21]
# Other tests are about its experts and routers.
ATTENTION_ONLY = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.fixture(params=MULTIMODAL)
def family(request: pytest.FixtureRequest) -> Multimodal:
    return MULTIMODAL[request.param]


def options_of(family: Multimodal) -> dict[str, Any]:
    return dict(ATTENTION_ONLY) if family.kind == "llama4" else {}


def plan_of(*, packing: bool) -> BatchPlan:
    size, collate = (sum(LENGTHS), collate_packed) if packing else (len(LENGTHS), collate_padded)
    return BatchPlan(zoo.rows_of(LENGTHS), packing=packing, size=size, batches_per_step=1, seed=0, collate=collate)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    (batch,) = plan_of(packing=False).all_batches()
    return LossFunction(model).logits(batch)


def outside_names(model: PreTrainedModel) -> list[str]:
    return [part.name for part in multimodal.outside_text(model)]


@pytest.mark.slow
def test_text_trains_the_decoder_and_the_merged_model_has_the_towers_unchanged(family: Multimodal, tmp_path: Path):
    folder = multimodal_families.write(family, tmp_path / "base")
    base = checkpoint(folder)
    model = base.load(CPU).model
    towers = outside_names(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    base_logits = logits(model)

    adapted = attach_adapter.attach(model, zoo.spec_of(**options_of(family)), seed=0)
    kinds = {name.rpartition(".")[2] for name in attach_adapter.adapted_layers(adapted)}
    assert kinds == (set(ATTENTION_ONLY["target_modules"]) if options_of(family) else family.layers)
    assert not [name for name in attach_adapter.adapted_layers(adapted) if multimodal.is_inside(name, towers)]
    assert torch.equal(logits(adapted), base_logits)  # a fresh adapter changes nothing

    packing = family.packs
    check = select_attention.choose_attention(model, "auto", packing=packing)
    assert packing == (check is not None)
    fp32_weights.upcast_trainable_params(adapted)
    if family.kind != "llama4":  # its head is the text model's, and the loss calls the whole model
        head = LossFunction(adapted).head
        assert head is not None
        assert head.plain
    plan = plan_of(packing=packing)
    batch = next(plan.all_batches())
    attach_adapter.check_gradients_reach(adapted, lambda: LossFunction(adapted)(batch).loss)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    spec = TrainingSpec.model_validate({"learning_rate": 1e-2, "schedule": "constant", "warmup": 0})
    (step,) = fit(
        adapted,
        plan,
        spec=spec,
        optimizer=make_optimizer(adapted, spec),
        accelerator=Accelerator(cpu=True),
        total=1,
        task="causal-lm",
    )
    assert step.supervised > 0
    trained = dict(model.named_parameters())
    frozen = {name.replace(".base_layer.", "."): p for name, p in trained.items() if not p.requires_grad}
    assert all(torch.equal(frozen[name], p) for name, p in before.items() if name in frozen)

    for name, p in adapted.named_parameters():  # as after more training
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.set_attn_implementation("eager")
    expected = logits(adapted)
    save_adapter.save_adapter(adapted, tmp_path / "adapter", base="x", revision=None)
    reloaded = base.load(CPU, attention="eager").model
    loaded = PeftModel.from_pretrained(reloaded, str(tmp_path / "adapter"))
    assert zoo.relative(logits(loaded), expected) < 1e-6

    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    originals, written = (safetensors_io.list_tensors(path) for path in (folder, tmp_path / "merged"))
    assert written.keys() == originals.keys()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == family.kind
    merged = checkpoint(tmp_path / "merged").load(CPU, attention="eager").model
    assert type(merged) is type(model)
    assert zoo.relative(logits(merged), expected) < 1e-5
    read_back = dict(merged.named_parameters())
    assert all(torch.equal(read_back[name], p) for name, p in before.items() if multimodal.is_inside(name, towers))
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    answers = merged.generate(input_ids=ids, attention_mask=(ids > 0).long(), generation_config=config)
    assert answers.shape == (2, 6)


@pytest.mark.slow
def test_packed_rows_of_the_decoder_equal_separate_rows_or_raise_with_the_reason(family: Multimodal, tmp_path: Path):
    model = checkpoint(multimodal_families.write(family, tmp_path)).load(CPU).model
    if not family.packs:
        with pytest.raises(LoraError, match=r"data\.packing: \w+ does not isolate packed rows; tried .*\("):
            select_attention.choose_attention(model, "auto", packing=True)
        return
    check = select_attention.choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.leak <= select_attention.MAX_LEAK
    (packed,) = plan_of(packing=True).all_batches()
    packed_logits = LossFunction(model).logits(packed)
    model.set_attn_implementation("eager")
    rows = zoo.rows_of(LENGTHS)
    separate = [LossFunction(model).logits(collate_padded([rows[i]], [i], 0)) for i in packed.rows]
    assert zoo.relative(packed_logits, torch.cat(separate)) < 1e-5


@cache
def skeleton(name: str) -> PreTrainedModel:
    config = multimodal_families.config_of(MULTIMODAL[name])
    return checkpoint(Path("nowhere"), config=config).skeleton()


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_towers_are_told_with_their_layers(name: str):
    model = skeleton(name)
    found = multimodal.outside_text(model)
    layers = linear_layers(model)
    counts: dict[str, int] = {}
    for part, inside in multimodal.outside_layers(found, layers):
        counts[part.kind] = counts.get(part.kind, 0) + len(inside)
    assert counts == MULTIMODAL[name].towers
    lines = multimodal.describe_outside(found, layers)
    assert all("frozen, not in the adapter (" in line for line in lines)
    assert len(lines) == len(counts)


def test_gemma_3_4b_tells_its_162_layers():
    """The SigLIP tower of the 4B, 12B and 27B models has 27 layers of 6 linear layers each."""
    tower = {"num_hidden_layers": 27, "vision_use_head": False}
    config = AutoConfig.for_model("gemma3", text_config=multimodal_families.TEXT, vision_config=tower)
    model = checkpoint(Path("nowhere"), config=config).skeleton()
    assert multimodal.describe_outside(multimodal.outside_text(model), linear_layers(model)) == [
        "  vision tower: 162 layers, frozen, not in the adapter (model.vision_tower)"
    ]


def test_a_text_model_has_nothing_outside():
    for name in ("llama", "gemma3", "gpt2", "bloom", "deepseek3"):
        model = zoo.make(name)
        assert multimodal.outside_text(model) == []
        assert all(name == text for name, text in multimodal.text_names(model).items())


@pytest.mark.parametrize("requested", ["all-linear", ["q_proj", "v_proj"], r".*\.(q_proj|v_proj)", "q_proj"])
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava", "idefics3"])  # their towers have a q_proj too
def test_named_targets_are_not_adapted_in_the_tower(name: str, requested: Any):
    model = skeleton(name)
    targets = resolve_target_modules(model, AdapterSpec(target_modules=requested))
    assert isinstance(targets.modules, list)
    decoder = next(path for path, module in model.named_modules() if module is model.get_decoder())
    assert all(target.startswith(f"{decoder}.layers.") for target in targets.modules)
    expected = {"q_proj"} if requested == "q_proj" else {"q_proj", "v_proj"}
    kinds = {target.rpartition(".")[2] for target in targets.modules}
    assert kinds == (set(MULTIMODAL[name].layers) if requested == "all-linear" else expected)


@pytest.mark.parametrize("excluded", [["vision_tower"], ".*vision_tower.*", ["out_proj"], ["vision_tower", "up_proj"]])
def test_excluding_the_tower_excludes_nothing_else(excluded: Any):
    targets = resolve_target_modules(skeleton("gemma3"), AdapterSpec(exclude_modules=excluded))
    kinds = {target.rpartition(".")[2] for target in targets.modules}
    assert kinds == MULTIMODAL["gemma3"].layers - ({"up_proj"} if "up_proj" in excluded else set())


def test_layers_are_those_of_the_decoder():
    targets = resolve_target_modules(skeleton("gemma3"), AdapterSpec(layers=[1]))
    assert {target.split(".")[3] for target in targets.modules} == {"1"}
    with pytest.raises(LoraError, match=r"adapter\.layers: 7, but the model has layers 0 to 1"):
        resolve_target_modules(skeleton("gemma3"), AdapterSpec(layers=[7]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "fc1"]}, "fc1 matches only layers of model.vision_tower, the vision tower"),
        ({"target_modules": ".*vision_tower.*fc1"}, "matches only layers of model.vision_tower, the vision tower"),
        ({"modules_to_save": ["multi_modal_projector"]}, "is in model.multi_modal_projector, the projector"),
        ({"modules_to_save": ["fc1"]}, "fc1 is in model.vision_tower, the vision tower"),
    ],
)
def test_training_what_text_does_not_pass_through_raises(options: dict[str, Any], message: str):
    with pytest.raises(LoraError, match="text does not pass through it") as caught:
        attach_adapter.attach(skeleton("gemma3"), zoo.spec_of(**options), seed=0)
    assert message in caught.value.message
    assert caught.value.hint


def test_all_biases_are_those_of_the_decoder(tmp_path: Path):
    model = checkpoint(multimodal_families.write(MULTIMODAL["internvl"], tmp_path)).load(CPU).model
    adapted = attach_adapter.attach(model, zoo.spec_of(bias="all"), seed=0)
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert biases
    assert not [name for name in biases if "vision_tower" in name or "projector" in name]
    del adapted


@pytest.mark.parametrize(
    ("kind", "auto_class", "supported"),
    [
        ("gemma3", "AutoModelForCausalLM", True),  # its class for causal-lm is the whole model
        ("gemma3_text", "AutoModelForCausalLM", True),
        ("llama", "AutoModelForCausalLM", True),
        ("llama4", "AutoModelForImageTextToText", True),  # its class for causal-lm is the text decoder alone
        ("mllama", "AutoModelForImageTextToText", True),
        ("qwen2_5_vl", "AutoModelForImageTextToText", True),
        ("qwen2_audio", "AutoModelForMultimodalLM", True),
        ("qwen2_5_omni", "AutoModelForMultimodalLM", False),  # combines a model that listens with one that speaks
        ("florence2", "AutoModelForImageTextToText", False),  # an encoder with a decoder
        ("clip", "AutoModelForCausalLM", False),
    ],
)
def test_the_class_that_loads_a_config(kind: str, auto_class: str, supported: bool):
    config = AutoConfig.for_model(kind)
    assert tasks.auto_class(config, "causal-lm").__name__ == auto_class
    assert tasks.is_supported(config, "causal-lm") is supported


def test_a_missing_package_is_told_in_one_line():
    """The tower of Gemma 3n is a model of the package timm."""
    base: BaseCheckpoint = checkpoint(Path("nowhere"), config=AutoConfig.for_model("gemma3n"))
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(LoraError, match="requires the timm library") as caught:
            base.skeleton()
        assert "\n" not in caught.value.message
        assert caught.value.hint == "install the package that it names"


def test_only_the_decoder_needs_widths_that_the_cpu_can_multiply_in_4_bits():
    """The towers of Gemma 3 4B have layers with 4,304 inputs, which is no multiple of 64, but text passes none."""
    model = skeleton("gemma3")
    layers = linear_layers(model)
    tower, decoder = (
        next(layer for name, layer in layers.items() if part in name and "mlp" in name)
        for part in ("vision_tower", "language_model")
    )
    tower.in_features = 100
    check_cpu_widths(model, layers)
    decoder.in_features = 100
    with pytest.raises(LoraError, match=r"in_features of 4-bit layers must be a multiple of 64; found \w+ \(100\)"):
        check_cpu_widths(model, layers)
