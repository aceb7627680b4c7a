"""For every model family: target modules are found, a step changes only the adapter, saving and merging are exact,
and packed rows are isolated.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import collate_padded
from lora_cli.errors import LoraError
from lora_cli.model import (
    attach_adapter,
    expert_targets,
    experts,
    fp32_weights,
    save_adapter,
    select_attention,
    target_modules,
)
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.loss import LossFunction
from lora_cli.model.packing_support import packing_obstacle
from lora_cli.model.tasks import TASKS
from lora_cli.model.weight_memory import quantized_sizes
from lora_cli.recipe.schema import QuantizationSpec, TrainingSpec
from lora_cli.training.loop import fit
from lora_cli.training.optimizer import make_optimizer
from tests.model import families, zoo
from tests.model.families import FAMILIES, Family
from tests.support.checkpoints import CPU, checkpoint

LENGTHS = [12, 30, 7, 21]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Iterator[Path]:
    yield families.write(family, tmp_path / "base")
    shutil.rmtree(tmp_path)


def plan_of(family: Family, *, packing: bool) -> BatchPlan:
    size = sum(LENGTHS) if packing else len(LENGTHS)
    collate = families.collate_of(family, packing=packing)
    rows = families.rows_of(family, LENGTHS)
    return BatchPlan(rows, packing=packing, size=size, batches_per_step=1, seed=0, collate=collate)


def attached(family: Family, folder: Path) -> tuple[PeftModel, set[str]]:
    """Attach an adapter as training does; return the model and the kinds of its linear layers."""
    loaded = families.load(family, folder)
    layers = target_modules.linear_layers(loaded.model, loaded.heads)
    context = AdapterContext(task=family.task, heads=loaded.heads)
    model = attach_adapter.attach(loaded.model, zoo.spec_of(**family.adapter), seed=0, context=context)
    return model, {name.rpartition(".")[2] for name in layers}


@torch.no_grad()
def logits(model: Any, family: Family) -> Tensor:
    """Return the logits of all rows in one padded batch."""
    model.eval()
    (batch,) = plan_of(family, packing=False).all_batches()
    return LossFunction(model, task=family.task).logits(batch)


@pytest.mark.slow
def test_one_step_changes_only_the_adapter_and_saving_and_merging_are_exact(
    family: Family, folder: Path, tmp_path: Path
):
    model, kinds = attached(family, folder)
    base = model.get_base_model()
    # PEFT cannot adapt layers with these names in some families: see expert_targets.py.
    kinds -= expert_targets.misread_names(base, zoo.spec_of(**family.adapter))
    kinds |= {name.rpartition(".")[2] for name in experts.expert_weights(base)}
    adapted = attach_adapter.adapted_layers(model)
    assert {name.rpartition(".")[2] for name in adapted} == family.layers
    # Every linear layer outside the heads and all experts have an adapter, except the ones that the model bypasses.
    assert kinds - target_modules.BYPASSED.get(family.kind, frozenset()) == family.layers
    packing = family.packs
    select_attention.choose_attention(
        model.get_base_model(), "auto", packing=packing, causal=family.task == "causal-lm"
    )
    fp32_weights.upcast_trainable_params(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spec = TrainingSpec.model_validate({"learning_rate": 1e-2, "schedule": "constant", "warmup": 0})
    optimizer = make_optimizer(model, spec)
    (step,) = fit(
        model,
        plan_of(family, packing=packing),
        spec=spec,
        optimizer=optimizer,
        accelerator=Accelerator(cpu=True),
        total=1,
        task=family.task,
    )
    assert step.supervised > 0
    assert math.isfinite(step.loss)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= trained
    # In the first step A has no gradient, because B is zero.
    assert {name for name in trained if "lora_A" not in name} == changed

    for name, p in model.named_parameters():  # as after more training
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    # Another seed initializes another head, which the adapter replaces.
    reloaded = families.load(family, folder, seed=9).model
    for base in (model.get_base_model(), reloaded):
        base.set_attn_implementation("eager")
    expected = logits(model, family)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    loaded = PeftModel.from_pretrained(reloaded, str(tmp_path / "adapter"))
    assert zoo.relative(logits(loaded, family), expected) < 1e-5
    assert zoo.relative(logits(loaded.merge_and_unload(), family), expected) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_loss_of_a_16_bit_model_is_that_of_its_logits(family: Family, folder: Path):
    """Some models keep the sum over their layers in fp32, and convert it for the head."""
    model = families.load(family, folder, dtype=torch.bfloat16).model.eval()
    (batch,) = plan_of(family, packing=False).all_batches()
    loss_of = LossFunction(model, task=family.task)
    expected = loss_of._loss(loss_of.logits(batch), batch.targets)[0].sum()
    assert float(loss_of(batch).loss) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name, each in FAMILIES.items() if TASKS[each.task].is_classification])
def test_heads_and_poolers_of_classifiers_are_not_quantized(name: str, bits: int, tmp_path: Path):
    """They are new where the checkpoint is of a language model: there are no weights to quantize."""
    family = FAMILIES[name]
    folder = families.write(family, tmp_path / "base")
    quantization = QuantizationSpec.model_validate({"bits": bits})
    loaded = families.load(family, folder, quantization=quantization)
    model = loaded.model.eval()
    (batch,) = plan_of(family, packing=False).all_batches()
    assert math.isfinite(float(LossFunction(model, task=family.task)(batch).loss))
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    found = {f"{layer}.weight" for layer, module in model.named_modules() if isinstance(module, layers)}
    assert found
    assert not [layer for layer in found if layer.startswith(loaded.heads) or "pooler" in layer]
    skeleton = checkpoint(folder, task=family.task, labels=families.LABELS).skeleton()
    assert found == set(quantized_sizes(skeleton, quantization))


def test_a_layer_that_the_model_bypasses_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mamba multiplies with the weight of dt_proj directly: an adapter on it would never learn, without an error."""
    monkeypatch.setattr(target_modules, "BYPASSED", {})  # as in an architecture that is not listed
    family = FAMILIES["mamba"]._replace(adapter={"target_modules": ["in_proj", "x_proj", "dt_proj"]})
    model, _ = attached(family, families.write(family, tmp_path))
    with pytest.raises(LoraError, match=r"adapter\.target_modules: no gradient reaches dt_proj") as refused:
        attach_adapter.check_gradients_reach(
            model, lambda: LossFunction(model)(next(plan_of(family, packing=False).all_batches())).loss
        )
    assert "adapter.exclude_modules: [dt_proj]" in str(refused.value.hint)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].task == "causal-lm"], indirect=True)
def test_packed_rows_equal_separate_rows_or_raise_with_the_reason(family: Family, folder: Path):
    """Only rows of causal-lm are packed: the recipe's rules refuse packing for the other tasks."""
    model = families.load(family, folder).model
    obstacle = packing_obstacle(model.config, CPU)
    assert (obstacle is None) is family.packs  # what the config says before the load
    if not family.packs:
        with pytest.raises(LoraError, match=r"data\.packing: \w+ does not isolate packed rows; tried .*\(") as refused:
            select_attention.choose_attention(model, "auto", packing=True)
        assert refused.value.hint == "set data.packing: false"
        assert select_attention.choose_attention(model, "auto", packing=False) is None
        return
    check = select_attention.choose_attention(model, "auto", packing=True)
    assert check is not None
    (packed,) = plan_of(family, packing=True).all_batches()
    packed_logits = LossFunction(model).logits(packed)
    model.set_attn_implementation("eager")
    rows = families.rows_of(family, LENGTHS)
    separate = [LossFunction(model).logits(collate_padded([rows[i]], [i], 0)) for i in packed.rows]
    assert zoo.relative(packed_logits, torch.cat(separate)) < 1e-5
