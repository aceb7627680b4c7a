"""The plan for several GPUs: what is whole on each, what is spread, and which batches fit."""

import pytest
import torch
from torch import nn

from lora_cli.model.gpu_plan import (
    CONTEXT_BYTES,
    Form,
    Sharding,
    ddp_parts,
    fewest_gpus,
    fsdp_parts,
    plan_strategies,
    step_bytes,
)
from lora_cli.model.memory import TrainingMemory
from lora_cli.model.weight_memory import stored_weights, text_layers
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import zoo
from tests.model.families import FAMILIES, config_of
from tests.model.test_memory import memory_of
from tests.support import checkpoints

KEPT, RECOMPUTED = Form("kept", None, False, 512), Form("recomputed", 1, False, 512)
LAYERS = 8


@pytest.fixture(scope="module")
def memory() -> TrainingMemory:
    return memory_of(zoo.make("llama", num_hidden_layers=LAYERS))


def test_ddp_has_the_whole_model_on_each_gpu(memory: TrainingMemory):
    one, eight = ddp_parts(memory, 1), ddp_parts(memory, 8)
    plan = memory.plan(512)
    assert one[:5] == eight[:5] == plan[:5]
    assert one.exchanged == 0
    assert eight.exchanged == 2 * plan.gradients  # the message, and its sum
    step = step_bytes(memory, KEPT, 512)
    assert one.total(step) == plan.total + CONTEXT_BYTES


def test_what_is_exchanged_after_the_activations_are_freed_is_not_added_to_them(memory: TrainingMemory):
    parts = ddp_parts(memory, 8)
    assert parts.total(parts.exchanged) == parts.total(0) == parts.total(parts.exchanged + 1) - 1


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_fsdp_spreads_the_layers_and_nothing_else(memory: TrainingMemory, gpus: int):
    parts, whole = fsdp_parts(memory, gpus), ddp_parts(memory, gpus)
    outside, inside = memory.weights.outside.total, sum(layer.total for layer in memory.weights.layers)
    assert parts.weights == outside + inside // gpus  # 8 divides the rows of each weight
    assert parts.gathered == 2 * inside // LAYERS
    assert parts._replace(weights=whole.weights, gathered=0) == whole


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("bits", [None, 4])
def test_layers_that_wait_in_host_memory_are_not_on_the_gpu(gpus: int, bits: int | None):
    spec = None if bits is None else QuantizationSpec.model_validate({"bits": bits})
    model = memory_of(zoo.make("llama", num_hidden_layers=LAYERS), quantization=spec)
    sharded, offloaded = (fsdp_parts(model, gpus, cpu_offload=offload) for offload in (False, True))
    layers = [layer.plain + layer.codes for layer in model.weights.layers]
    tensors = [tensor for layer in model.weights.tensors for tensor in layer]
    assert sum(tensor.part(1) for tensor in tensors) == sum(layers)
    assert sharded.weights - offloaded.weights == pytest.approx(sum(layers) / gpus, abs=1)
    copied = offloaded.gathered - sharded.gathered  # the part of the layer that is fetched
    assert copied == pytest.approx(max(layers) / gpus, abs=1)
    assert sharded.total(0) - offloaded.total(0) == sharded.weights - offloaded.weights - copied
    # Page-locked memory comes in powers of two.
    assert sum(layers) / gpus <= offloaded.in_host < 2 * sum(layers) / gpus + 2 * len(tensors)
    assert offloaded.constants == sharded.constants


def part_of_first(parameter: nn.Parameter, gpus: int) -> int:
    """Return the bytes in bf16 of the rows that torch gives the first of `gpus`: FSDP2 fills the others up to them."""
    return 2 * torch.chunk(parameter, gpus)[0].numel()


@pytest.mark.parametrize("gpus", [2, 3, 8, 16, 100])
@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_parts_are_of_whole_rows_as_torch_splits_them(family: str, gpus: int):
    """Of stacked experts a row is an expert: with 16 GPUs, each has a whole one of 4, and gathers 16."""
    model = checkpoints.skeleton_of(config_of(FAMILIES[family]))
    of_layers = [[part_of_first(p, gpus) for p in layer.parameters()] for layer in text_layers(model).values()]
    weights = stored_weights(model, dtype=torch.bfloat16, quantization=None)
    memory = memory_of()._replace(weights=weights)
    sharded, offloaded = (fsdp_parts(memory, gpus, cpu_offload=offload) for offload in (False, True))
    assert sharded.weights == weights.outside.total + sum(map(sum, of_layers))
    assert sharded.gathered == 2 * gpus * max(map(sum, of_layers))
    assert offloaded.gathered == sharded.gathered + max(map(sum, of_layers))
    assert offloaded.in_host == sum(1 << (part - 1).bit_length() for parts in of_layers for part in parts)
    stacked = [tensor for tensor in weights.tensors[0] if tensor.number == 4]
    assert bool(stacked) == (family == "qwen2-moe")
    assert all(tensor.part(gpus) == tensor.size * max(1, 4 // gpus + (gpus == 3)) for tensor in stacked)


def test_hsdp_spreads_the_layers_over_the_gpus_of_a_machine(memory: TrainingMemory):
    plans = plan_strategies(memory, [KEPT], gpus=16, budget=1, sharding=Sharding(of_machine=8))
    assert [plan.name for plan in plans] == ["ddp", "hsdp"]
    assert plans[1].parts == fsdp_parts(memory, 8)
    (*_, of_few) = plan_strategies(memory, [KEPT], gpus=4, budget=1, sharding=Sharding(of_machine=8))
    assert of_few.parts == fsdp_parts(memory, 4)


def test_scales_of_quantized_weights_are_whole_with_fsdp():
    quantized = memory_of(quantization=QuantizationSpec.model_validate({"bits": 4}))
    assert fsdp_parts(quantized, 8).constants == ddp_parts(quantized, 8).constants > 0


def test_paged_state_does_not_count(memory: TrainingMemory):
    paged = memory._replace(paged=True)
    for parts in (ddp_parts, fsdp_parts):
        own, other = parts(paged, 4), parts(memory, 4)
        assert (own.optimizer, own.paged) == (0, other.optimizer)
        assert own.total(0) == other.total(0) - other.optimizer


def test_the_largest_batch_fits_and_one_more_token_does_not(memory: TrainingMemory):
    budget = ddp_parts(memory, 1).total(step_bytes(memory, KEPT, 300))
    (plan,) = plan_strategies(memory, [KEPT, RECOMPUTED], gpus=1, budget=budget)
    kept, recomputed = plan.forms
    assert kept.largest == 300
    assert not kept.fits
    assert recomputed.fits
    assert plan.best is recomputed
    assert plan.largest == recomputed.largest > 300
    over = ddp_parts(memory, 1).total(step_bytes(memory, RECOMPUTED, recomputed.largest + 1))
    assert over > budget


def test_a_budget_that_the_weights_exceed_has_no_batch(memory: TrainingMemory):
    plans = plan_strategies(memory, [KEPT], gpus=2, budget=1)
    assert [plan.name for plan in plans] == ["ddp", "fsdp"]
    assert [(plan.best, plan.largest) for plan in plans] == [(None, 0), (None, 0)]
    assert fewest_gpus(memory, KEPT, budget=1) is None


def test_the_fewest_gpus_fit_and_half_of_them_do_not():
    large = memory_of(
        zoo.make("llama", num_hidden_layers=4, hidden_size=512, intermediate_size=2048), dtype=torch.float32
    )
    step = step_bytes(large, KEPT, KEPT.tokens)
    budget = fsdp_parts(large, 16).total(step)
    count = fewest_gpus(large, KEPT, budget=budget)
    assert count == 16
    assert fsdp_parts(large, 8).total(step) > budget
