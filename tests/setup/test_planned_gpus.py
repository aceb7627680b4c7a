"""What to change in a recipe whose model does not fit the planned GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model.gpu_plan import Form, Sharding, fsdp_parts, plan_strategies, step_bytes
from lora_cli.model.memory import TrainingMemory
from lora_cli.recipe.schema import Recipe
from lora_cli.run.console import format_bytes
from lora_cli.setup.planned_gpus import PlannedGpus, changes_that_help, check_planned, host_bytes, planned_sharding
from tests.model.test_memory import memory_of
from tests.support.checkpoints import skeleton_of

ROW = Form("every layer is recomputed, their inputs wait in host memory", every=1, offload=True, tokens=1024)
ONE = PlannedGpus(1, 1 << 30)


def skeleton() -> PreTrainedModel:
    return skeleton_of(LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=1000))


@pytest.fixture(scope="module")
def memory() -> TrainingMemory:
    return memory_of(skeleton(), rank=64, alpha=64)


def lines(
    memory: TrainingMemory,
    gpus: PlannedGpus,
    *,
    quantization: Any = None,
    checkpointing: Any = "auto",
    offload: bool = False,
    strategy: str = "fsdp",
    shardable: bool = True,
) -> list[str]:
    recipe: Any = SimpleNamespace(
        quantization=quantization,
        adapter=SimpleNamespace(rank=64),
        training=SimpleNamespace(gradient_checkpointing=checkpointing),
        distributed=SimpleNamespace(cpu_offload=offload, strategy=strategy),
    )
    base = SimpleNamespace(skeleton=skeleton, dtype=torch.bfloat16)
    inputs: Any = SimpleNamespace(base=base, prequantized=None)
    form = ROW._replace(every=None, offload=False) if checkpointing is False else ROW
    plans = plan_strategies(memory, [form], gpus=gpus.number, budget=gpus.memory, sharding=planned_sharding(recipe))
    assert all(plan.best is None for plan in plans)
    return list(changes_that_help(recipe, inputs, memory, plans, gpus, shardable=shardable))


def test_quantization_is_told_with_what_the_weights_take_then(memory: TrainingMemory):
    told = lines(memory, ONE)
    assert told[0].startswith("quantization: {bits: 4}: the weights take ")
    assert told[1].startswith("  with that, a step takes ")
    assert not any(line.startswith("quantization") for line in lines(memory, ONE, quantization=object()))


def test_recomputation_is_told_where_the_recipe_forbids_it(memory: TrainingMemory):
    assert any(
        line.startswith("training.gradient_checkpointing: auto: ") for line in lines(memory, ONE, checkpointing=False)
    )
    assert not any("gradient_checkpointing" in line for line in lines(memory, ONE))


def test_shorter_rows_are_told_where_some_tokens_fit():
    memory = memory_of(skeleton(), rank=1, alpha=1)
    of_one = fsdp_parts(memory, 2).total(step_bytes(memory, ROW, 700))
    told = lines(memory, PlannedGpus(2, of_one), quantization=object())
    assert "data.max_length: 700 tokens fit at a time, and the longest row has 1,024" in told


def test_a_large_adapter_is_told(memory: TrainingMemory):
    assert any(line.startswith("adapter.rank: 32 instead of 64: ") for line in lines(memory, ONE))


def test_more_gpus_are_told_where_they_help(memory: TrainingMemory):
    budget = fsdp_parts(memory, 4).total(step_bytes(memory, ROW, ROW.tokens))
    assert lines(memory, PlannedGpus(2, budget), quantization=object())[-1] == (
        "--gpus 4: it fits on 4 such GPUs with fsdp"
    )


def test_more_gpus_are_told_with_the_strategy_that_they_need(memory: TrainingMemory):
    budget = fsdp_parts(memory, 16).total(step_bytes(memory, ROW, ROW.tokens))
    for number, strategy, expected in (
        (8, "auto", "--gpus 16: it fits on 16 such GPUs with fsdp"),
        (8, "hsdp", "distributed.strategy: fsdp, --gpus 16: it fits on 16 such GPUs with fsdp"),
        (16, "hsdp", "distributed.strategy: fsdp: it fits on 16 such GPUs with fsdp"),
        (8, "ddp", "distributed.strategy: fsdp, --gpus 16: it fits on 16 such GPUs with fsdp"),
    ):
        assert lines(memory, PlannedGpus(number, budget), quantization=object(), strategy=strategy)[-1] == expected


@pytest.mark.parametrize(
    ("number", "distributed", "error", "hint"),
    [
        (1, {"strategy": "hsdp", "cpu_offload": True}, "cpu_offload: .* one process has nothing to shard", "several"),
        (12, {"strategy": "hsdp"}, "^--gpus 12: .* hsdp needs .* with 8 GPUs$", "--gpus 8 or 16; or write strategy"),
        (9, {"strategy": "hsdp", "cpu_offload": True}, "^--gpus 9: ", "--gpus 8 or 16"),
        (1, {"strategy": "hsdp"}, None, None),
        (6, {"strategy": "hsdp"}, None, None),
        (24, {"strategy": "hsdp", "cpu_offload": True}, None, None),
        (12, {"strategy": "fsdp", "cpu_offload": True}, None, None),
    ],
)
def test_gpus_that_a_run_would_refuse_are_not_planned(
    number: int, distributed: dict[str, Any], error: str | None, hint: str | None
):
    recipe = Recipe.model_validate(
        {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "distributed": distributed}
    )
    if error is None or hint is None:
        check_planned(recipe, PlannedGpus(number, 1 << 40))
        return
    with pytest.raises(LoraError, match=error) as raised:
        check_planned(recipe, PlannedGpus(number, 1 << 40))
    assert hint in str(raised.value.hint)


def test_what_an_offload_gains_is_of_the_recipes_own_form(memory: TrainingMemory):
    """`gradient_checkpointing: auto`, which is told too, does not belong to it."""
    kept = ROW._replace(every=None, offload=False)
    before, after = (
        format_bytes(fsdp_parts(memory, 2, cpu_offload=offload).total(step_bytes(memory, kept, ROW.tokens)))
        for offload in (False, True)
    )
    told = lines(memory, PlannedGpus(2, 1 << 30), quantization=object(), checkpointing=False)
    (line,) = [line for line in told if "cpu_offload" in line]
    assert f": {after} on a GPU instead of {before}, which " in line


def test_host_memory_has_paged_state_and_inputs_that_wait(memory: TrainingMemory):
    gpus = PlannedGpus(16, 1 << 50)
    plain, paged = (
        plan_strategies(each, [ROW], gpus=16, budget=gpus.memory)[0] for each in (memory, memory._replace(paged=True))
    )
    difference = host_bytes(memory, paged, gpus) - host_bytes(memory, plain, gpus)
    assert difference == 8 * memory.optimizer  # of the processes of one machine
    kept = plan_strategies(memory, [ROW._replace(every=None, offload=False)], gpus=16, budget=gpus.memory)[0]
    waiting = host_bytes(memory, plain, gpus) - host_bytes(memory, kept, gpus)
    assert waiting == 8 * memory.activations.offloaded(every=1) * ROW.tokens


def test_layers_in_host_memory_are_told_with_what_they_gain(memory: TrainingMemory):
    """The rest of the recipe stays as it is, and the GPUs are as many: here the layers alone are too much."""
    two = PlannedGpus(2, fsdp_parts(memory, 2, cpu_offload=True).total(step_bytes(memory, ROW, ROW.tokens)))
    (told,) = [line for line in lines(memory, two) if line.startswith("distributed: {strategy: fsdp, cpu_offload: ")]
    assert ", which fits; the layers wait in " in told
    assert " of the host memory of a machine with 2 GPUs" in told
    too_small = two._replace(memory=two.memory - 1)
    assert any("cpu_offload" in line and "which does not fit" in line for line in lines(memory, too_small))
    for options in ({"shardable": False}, {"offload": True}):
        assert not any("cpu_offload" in line for line in lines(memory, too_small, **options))
    assert not any("cpu_offload" in line for line in lines(memory, ONE))


def test_host_memory_has_the_layers_that_wait(memory: TrainingMemory):
    gpus = PlannedGpus(16, 1 << 50)
    plain, offloaded = (
        plan_strategies(memory, [ROW], gpus=16, budget=gpus.memory, sharding=Sharding(offload))[-1]
        for offload in (False, True)
    )
    assert host_bytes(memory, offloaded, gpus) - host_bytes(memory, plain, gpus) == 8 * offloaded.parts.in_host > 0


def test_a_base_that_is_sharded_over_a_machine_is_planned_so(memory: TrainingMemory):
    sixteen = PlannedGpus(16, fsdp_parts(memory, 8, cpu_offload=True).total(step_bytes(memory, ROW, ROW.tokens)))
    (told,) = [line for line in lines(memory, sixteen, strategy="hsdp") if "cpu_offload" in line]
    assert told.startswith("distributed: {strategy: hsdp, cpu_offload: true}: ")
    assert ", which fits; " in told
