"""The strategy of a run: fsdp where a full model does not fit, and where the base can be sharded."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model.gpu_plan import Form, full_model_bytes, offloaded_bytes
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.schema import Recipe
from lora_cli.setup import strategy
from tests.model import zoo
from tests.model.test_memory import memory_of

GIB = 1 << 30


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that chooses for a model of 10 GiB, in two processes."""

    def run(
        *,
        free: float,
        processes: int = 2,
        prequantized: bool = False,
        problem: str = "",
        device: str = "cuda",
        **sections: Any,
    ) -> strategy.Strategy:
        monkeypatch.setattr(strategy, "_needed", lambda *_: 10 * GIB)
        monkeypatch.setattr(strategy, "sharding_problem", lambda *_: problem)
        monkeypatch.setattr(strategy, "_trained_modules", lambda *_: ("lm_head",))
        monkeypatch.setattr(strategy.memory, "free_for_process", lambda *_: int(free * GIB))
        recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **sections})
        inputs: Any = SimpleNamespace(
            prequantized=object() if prequantized else None,
            base=SimpleNamespace(
                source=SimpleNamespace(packed=False), skeleton=lambda: zoo.make("llama"), dtype=torch.float32
            ),
            device=torch.device(device),
        )
        plan: Any = SimpleNamespace(processes=processes)
        return strategy.choose_strategy(recipe, inputs, plan)

    return run


def test_auto_shards_what_does_not_fit(choose: Any):
    fits, too_large = choose(free=12), choose(free=11)
    assert (fits.name, fits.kept_whole) == ("ddp", None)
    assert (too_large.name, too_large.kept_whole) == ("fsdp", ("lm_head",))
    why = "auto: a full model in each process needs about 10.0 GiB, and "
    assert (fits.why, too_large.why) == (f"{why}12.0 GiB is free", f"{why}11.0 GiB is free, of which it may take 90%")


def test_auto_says_why_it_cannot_shard(choose: Any):
    for options, reason in (
        ({"prequantized": True}, "fsdp cannot shard a checkpoint that is quantized already"),
        ({"adapter": {"method": "corda"}}, "fsdp cannot shard the base of corda"),
        ({"task": "seq-cls"}, "fsdp is for causal-lm, not for seq-cls"),
        ({"problem": "no layers"}, "fsdp cannot shard this base: no layers"),
    ):
        chosen = choose(free=1, **options)
        assert chosen.name == "ddp"
        assert f"; but {reason}" in chosen.why


def test_a_wish_is_kept_or_refused(choose: Any):
    assert choose(free=1, distributed={"strategy": "ddp"}) == strategy.Strategy("ddp")
    assert choose(free=99, distributed={"strategy": "fsdp"}).name == "fsdp"
    with pytest.raises(LoraError, match=r"distributed\.strategy: fsdp cannot shard a checkpoint that is quantized"):
        choose(free=99, distributed={"strategy": "fsdp"}, prequantized=True)


def test_one_process_has_nothing_to_shard(choose: Any):
    assert choose(free=1, processes=1) == strategy.Strategy("ddp")
    alone = choose(free=1, processes=1, distributed={"strategy": "fsdp"})
    assert (alone.name, alone.why) == ("ddp", "one process has nothing to shard")


OFFLOAD = {"strategy": "fsdp", "cpu_offload": True}


def test_layers_in_host_memory_are_told_or_refused(choose: Any):
    chosen = choose(free=1, distributed=OFFLOAD)
    assert chosen.name == "fsdp"
    assert re.fullmatch(
        r"set in the recipe; cpu_offload: [\d.]+ KiB of host memory for the layers of each process", chosen.why
    )
    with pytest.raises(LoraError, match=r"cpu_offload: it needs .* each process, and 700 MiB .* of the 700 MiB free"):
        choose(free=700 / 1024, distributed=OFFLOAD)  # the layers would fit, but not the process with them
    weights = stored_weights(zoo.make("llama"), dtype=torch.float32, quantization=None)
    enough = (700 * 2**20 + offloaded_bytes(weights, 2)) / 0.9
    assert choose(free=(enough + 1024) / GIB, distributed=OFFLOAD).name == "fsdp"
    with pytest.raises(LoraError, match=r"which is more than 90% of the"):
        choose(free=(enough - 1024) / GIB, distributed=OFFLOAD)
    with pytest.raises(LoraError, match=r"^distributed\.cpu_offload: .* one process has nothing to shard$"):
        choose(free=1, distributed=OFFLOAD, processes=1)


@pytest.mark.parametrize("processes", [1, 2])
def test_layers_on_the_cpu_are_in_host_memory_anyway(choose: Any, processes: int):
    chosen = choose(free=0, distributed=OFFLOAD, processes=processes, device="cpu")
    assert chosen.name == ("fsdp" if processes == 2 else "ddp")
    assert chosen.why.endswith("; cpu_offload has no effect on the CPU, where the base is in host memory anyway")


NEEDED = "auto: a full model in each process needs about"


@pytest.mark.parametrize(
    ("sections", "budget", "name", "why"),
    [
        ({}, 10.5, "ddp", rf"{NEEDED} 8\.9 GiB, and 10\.0 GiB is free"),
        ({}, 10, "fsdp", rf"{NEEDED} 8\.9 GiB, and 9\.5 GiB is free, of which it may take 90%"),
        ({"distributed": {"strategy": "fsdp"}}, 99, "fsdp", "set in the recipe"),
        ({"distributed": {"strategy": "ddp"}}, 1, "ddp", "set in the recipe"),
        ({"task": "seq-cls"}, 1, "ddp", rf"{NEEDED} .* 90%; but fsdp is for causal-lm, not for seq-cls"),
    ],
)
def test_a_plan_says_what_a_run_would_take(
    sections: dict[str, Any], budget: float, name: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    """By the same rule: of what CUDA leaves, 90 % for the forms that divide no batch and keep all on the GPU."""
    monkeypatch.setattr(strategy, "sharding_problem", lambda *_: "")
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **sections})
    inputs: Any = SimpleNamespace(prequantized=None, base=SimpleNamespace(source=SimpleNamespace(packed=False)))
    memory = memory_of()._replace(optimizer=int(8.9 * GIB))
    chosen = strategy.planned_strategy(
        recipe, inputs, memory, Form("", 1, False, 512), gpus=2, budget=round(budget * GIB)
    )
    assert chosen.name == name
    assert re.fullmatch(why, chosen.why)


def test_paged_state_needs_no_memory_of_a_gpu():
    """It moves to the host where the GPU is full, in the plan of GPUs and in a run."""
    memory, form = memory_of(), Form("", 1, False, 512)
    whole, paged = (full_model_bytes(memory._replace(paged=paged), form, processes=2) for paged in (False, True))
    assert whole - paged == memory.optimizer


def test_the_form_that_decides_divides_no_batch_and_keeps_all_on_the_gpu():
    model, rows = zoo.attached(zoo.make("llama")), zoo.rows_of([30] * 8)
    for options, every, tokens in (
        ({}, 1, 120),
        ({"training": {"gradient_checkpointing": False}}, None, 120),
        ({"adapter": {"method": "prefix"}}, None, 120),  # whose layers cannot be recomputed
    ):
        recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **options})
        plan = BatchPlan(rows, packing=True, size=120, batches_per_step=1, seed=0)
        forms = strategy.forms_of(recipe, model, plan)
        form = strategy.full_batch_form(forms, plan)
        assert (form.every, form.offload, form.tokens) == (every, False, tokens)
        assert min(each.tokens for each in forms) == 30
    joined = BatchPlan(rows, packing=True, size=60, batches_per_step=4, seed=0, join=True)
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}})
    assert strategy.full_batch_form(strategy.forms_of(recipe, model, joined), joined).tokens == 90
