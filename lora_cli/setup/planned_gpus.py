"""GPUs that this machine need not have: the inputs of a run on them, its forms, and what to change where none fits."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lora_cli.errors import LoraError
from lora_cli.model.device import pick_dtype
from lora_cli.model.gpu_plan import CONTEXT_BYTES, Form, Sharding, StrategyPlan, fewest_gpus, plan_strategies
from lora_cli.model.memory import FP32, PROCESS_BYTES, TrainingMemory
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.schema import QuantizationSpec, Recipe
from lora_cli.run.console import format_bytes
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.strategy import check_offload

GPU = torch.device("cuda")
MIN_SHARE = 0.02  # of a GPU's memory: an adapter that takes less is not named
GPUS_OF_MACHINE = 8  # processes on one machine, for its host memory; with more GPUs there are more machines


class PlannedGpus(NamedTuple):
    """GPUs that a run is planned for."""

    number: int
    memory: int  # bytes of each

    def describe(self) -> str:
        """Return them in words: `8 GPUs with 74.5 GiB (80.0 GB) each`."""
        size = f"{format_bytes(self.memory)} ({self.memory / 1e9:.1f} GB)"
        return f"{self.number} GPUs with {size} each" if self.number > 1 else f"one GPU with {size}"


def planned_gpus(count: int | None, budget: int | None) -> PlannedGpus | None:
    """Return the GPUs that the options --gpus and --budget describe; None without them.

    Without --budget, they have the memory of this machine's first GPU; without --gpus, there is one.

    Raises:
        LoraError: this machine has no GPU whose memory could be taken, or the budget is too small for any GPU.
    """
    if count is None and budget is None:
        return None
    if budget is None:
        if not torch.cuda.is_available():
            raise LoraError(
                f"--gpus {count}: this machine has no GPU whose memory could be planned with",
                hint="give the memory of one GPU: --budget 80GB",
            )
        budget = int(torch.cuda.get_device_properties(0).total_memory)
    if budget <= CONTEXT_BYTES:
        raise LoraError(
            f"--budget: a GPU needs {format_bytes(CONTEXT_BYTES)} before any tensor, and this is "
            f"{format_bytes(budget)}",
            hint="write the memory of one GPU with its unit: --budget 80GB",
        )
    return PlannedGpus(count or 1, budget)


def check_planned(recipe: Recipe, gpus: PlannedGpus) -> None:
    """Check that a run of `recipe` could start on these GPUs.

    Raises:
        LoraError: one GPU has no other to share a base with, or the GPUs do not fill machines of GPUS_OF_MACHINE.
    """
    check_offload(recipe, processes=gpus.number)
    full, rest = divmod(gpus.number, GPUS_OF_MACHINE)
    if recipe.distributed.strategy == "hsdp" and full and rest:
        counts = f"--gpus {full * GPUS_OF_MACHINE} or {(full + 1) * GPUS_OF_MACHINE}"
        raise LoraError(
            f"--gpus {gpus.number}: distributed.strategy: hsdp needs as many processes on each machine, and machines "
            f"are planned with {GPUS_OF_MACHINE} GPUs",
            hint=f"plan {counts}; or write strategy: fsdp",
        )


def on_planned_gpus(recipe: Recipe, inputs: RunInputs) -> RunInputs:
    """Return `inputs`, which were loaded on this machine for `recipe`, as they would be on a GPU.

    With `model.dtype: auto`, the GPU multiplies bfloat16, as all since Ampere do.
    """
    spec, name = recipe.quantization, recipe.model.dtype
    open_dtype = name == "auto" and (spec is None or spec.bits != 4 or spec.compute_dtype == "auto")
    dtype = torch.bfloat16 if open_dtype else pick_dtype(name, GPU, spec)
    resolved = recipe.with_compute_dtype(str(dtype).removeprefix("torch."))
    return inputs._replace(
        recipe=inputs.recipe.model_copy(update={"quantization": resolved.quantization}),
        device=GPU,
        base=inputs.base._replace(dtype=dtype),
    )


def planned_sharding(recipe: Recipe) -> Sharding:
    """Return how the base of a run on planned GPUs is sharded, if it is."""
    spec = recipe.distributed
    return Sharding(spec.cpu_offload, GPUS_OF_MACHINE if spec.strategy == "hsdp" else None)


def host_bytes(memory: TrainingMemory, plan: StrategyPlan, gpus: PlannedGpus) -> int:
    """Return the bytes of host memory that the processes of one machine need, without files that the system caches."""
    best, here = plan.best, min(gpus.number, GPUS_OF_MACHINE)
    inputs = 0
    if best is not None and best.form.offload and best.form.every is not None:
        inputs = memory.activations.offloaded(every=best.form.every) * best.form.tokens
    return here * (PROCESS_BYTES + inputs + plan.parts.paged + plan.parts.in_host)


def changes_that_help(
    recipe: Recipe,
    inputs: RunInputs,
    memory: TrainingMemory,
    plans: list[StrategyPlan],
    gpus: PlannedGpus,
    *,
    shardable: bool,
) -> Iterator[str]:
    """Yield what to change in a recipe that does not fit, with the effect of each change.

    `shardable` is whether the base can be sharded.
    """
    sharding = planned_sharding(recipe)
    form = min((each for plan in plans for each in plan.forms), key=lambda each: each.total).form
    changed, own = memory, form
    if recipe.quantization is None and inputs.prequantized is None:
        four_bits = QuantizationSpec.model_validate({"bits": 4})
        weights = stored_weights(inputs.base.skeleton(), dtype=inputs.base.dtype, quantization=four_bits)
        changed = memory._replace(weights=weights, dense=inputs.base.dtype.itemsize * weights.largest)
        packed, whole = (format_bytes(each.weights.whole.total) for each in (changed, memory))
        yield f"quantization: {{bits: 4}}: the weights take {packed} instead of {whole}"
    if recipe.training.gradient_checkpointing is False:
        less = form._replace(every=1, offload=True)
        saved, kept = (memory.plan(form.tokens, every=each.every, offload=each.offload) for each in (less, form))
        yield (
            "training.gradient_checkpointing: auto: saved activations of a part of a batch take "
            f"{format_bytes(saved.activations)} instead of {format_bytes(kept.activations)}"
        )
        form = less
    best = min(
        plan_strategies(changed, [form], gpus=gpus.number, budget=gpus.memory, sharding=sharding),
        key=lambda plan: plan.forms[0].total,
    )
    smaller = changed is not memory or recipe.training.gradient_checkpointing is False
    if smaller:
        total = best.forms[0].total
        fits = "fits" if best.best else "does not fit"
        name = best.name if gpus.number > 1 else "a step"
        yield f"  with that, {name} takes {format_bytes(total)} on a GPU, which {fits}"
    if shardable and not sharding.cpu_offload and gpus.number > 1:
        yield from _offload_that_helps(memory, own, gpus, sharding)
    if best.largest < form.tokens and best.largest:
        yield f"data.max_length: {best.largest:,} tokens fit at a time, and the longest row has {form.tokens:,}"
    state, rank = FP32 * (memory.adapter.total + memory.trained.total) + memory.optimizer, recipe.adapter.rank
    if rank is not None and rank > 1 and state > MIN_SHARE * gpus.memory:
        yield (
            f"adapter.rank: {rank // 2} instead of {rank}: adapter, gradients and optimizer take "
            f"{format_bytes(state * (rank // 2) / rank)} instead of {format_bytes(state)}"
        )
    count = fewest_gpus(changed, form, budget=gpus.memory, cpu_offload=sharding.cpu_offload) if shardable else None
    if best.best is None and count is not None:
        yield from _gpus_that_help(recipe, gpus, count, with_that="with that, " if smaller else "")


def _gpus_that_help(recipe: Recipe, gpus: PlannedGpus, count: int, *, with_that: str) -> Iterator[str]:
    """Yield how many GPUs fit with fsdp, and that the recipe must have it, if its strategy is another one."""
    strategy = recipe.distributed.strategy
    needed = [] if strategy in ("auto", "fsdp") else ["distributed.strategy: fsdp"]
    needed += [f"--gpus {count}"] if count > gpus.number else []
    if needed:
        yield f"{', '.join(needed)}: {with_that}it fits on {count} such GPUs with fsdp"


def _offload_that_helps(memory: TrainingMemory, form: Form, gpus: PlannedGpus, sharding: Sharding) -> Iterator[str]:
    """Yield what `cpu_offload` gains, if a GPU needs less with it: the rest of the recipe stays as it is."""
    sharded, offloaded = (
        plan_strategies(memory, [form], gpus=gpus.number, budget=gpus.memory, sharding=each)[-1]
        for each in (sharding, sharding._replace(cpu_offload=True))
    )
    before, after = sharded.forms[0], offloaded.forms[0]
    if after.total < before.total:
        machine = min(gpus.number, GPUS_OF_MACHINE)
        of_host = format_bytes(machine * offloaded.parts.in_host)
        yield (
            f"distributed: {{strategy: {offloaded.name}, cpu_offload: true}}: {format_bytes(after.total)} on a GPU "
            f"instead of {format_bytes(before.total)}, which {'fits' if after.fits else 'does not fit'}; the layers "
            f"wait in {of_host} of the host memory of a machine with {machine} GPUs"
        )
