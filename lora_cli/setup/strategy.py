"""Choose how a run is spread over processes: the full model in each (ddp), or a base sharded over them (fsdp, hsdp)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import memory
from lora_cli.model.gpu_plan import CONTEXT_BYTES, Form, full_model_bytes, offloaded_bytes
from lora_cli.model.sharded_base import sharding_problem
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.sharding_rules import KEY, OFFLOAD_KEY, SHARDED, sharding_conflicts
from lora_cli.run import console
from lora_cli.run.worker import processes_of_machine
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.training_memory import memory_of_run
from lora_cli.setup.training_model import adapted_skeleton, resolve_optimizer
from lora_cli.training.memory_ladder import all_rungs

MAX_SHARE = 0.9  # of the free memory that an estimate may take
StrategyName = Literal["ddp", "fsdp", "hsdp"]


class Strategy(NamedTuple):
    """How a run is spread over its processes."""

    name: StrategyName
    why: str = ""
    whole: tuple[str, ...] = ()  # of a sharded base: modules whose weights are not, because they are trained

    @property
    def kept_whole(self) -> tuple[str, ...] | None:
        """The modules that are not sharded; None if nothing is."""
        return self.whole if self.name in SHARDED else None


def choose_strategy(
    recipe: Recipe, inputs: RunInputs, plan: BatchPlan, *, any_process: Callable[[bool], bool] = bool
) -> Strategy:
    """Return the strategy that the recipe requests, or that `auto` chooses: fsdp if the full model does not fit.

    Args:
        recipe: of the run.
        inputs: of the run.
        plan: of its batches, for all its processes.
        any_process: returns whether a value is true in any process of the run; all get the same strategy.

    Raises:
        LoraError: the recipe requests fsdp or hsdp, and the base cannot be sharded; or it requests cpu_offload, and
            there is one GPU, or the host memory of this machine does not hold the layers.
    """
    wanted = recipe.distributed.strategy
    offload = _offload(recipe, inputs, processes=plan.processes) if recipe.distributed.cpu_offload else ""
    if plan.processes == 1:
        return Strategy("ddp", f"one process has nothing to shard{offload}" if wanted in SHARDED else "")
    if wanted == "ddp":
        return Strategy("ddp")
    if wanted != "auto":
        return Strategy(wanted, _required(recipe, inputs) + offload, _trained_modules(recipe, inputs))
    free = memory.free_for_process(inputs.device, processes_of_machine(plan.processes))
    chosen = _choose(recipe, inputs, _needed(recipe, inputs, plan), free, any_process=any_process)
    return chosen if chosen.name == "ddp" else chosen._replace(whole=_trained_modules(recipe, inputs))


def planned_strategy(
    recipe: Recipe, inputs: RunInputs, of_run: memory.TrainingMemory, form: Form, *, gpus: int, budget: int
) -> Strategy:
    """Return the strategy that a run on `gpus` planned GPUs of `budget` bytes each would have, and why.

    Args:
        recipe: of the run.
        inputs: of the run, on such a GPU.
        of_run: what it takes.
        form: of `full_batch_form`.
        gpus: several.
        budget: bytes of each.

    Raises:
        LoraError: the recipe requests fsdp or hsdp, and the base cannot be sharded.
    """
    wanted = recipe.distributed.strategy
    if wanted == "ddp":
        return Strategy("ddp", "set in the recipe")
    if wanted != "auto":
        return Strategy(wanted, _required(recipe, inputs))
    need = full_model_bytes(of_run, form, processes=gpus)
    return _choose(recipe, inputs, need, budget - CONTEXT_BYTES)


def _choose(
    recipe: Recipe, inputs: RunInputs, need: int, free: int, *, any_process: Callable[[bool], bool] = bool
) -> Strategy:
    """Return the strategy that `auto` takes, where each process needs `need` bytes for a full model."""
    texts = f"auto: a full model in each process needs about {console.format_bytes(need)}"
    texts += f", and {console.format_bytes(free)} is free"
    if not any_process(need > MAX_SHARE * free):
        return Strategy("ddp", texts)
    texts += f", of which it may take {MAX_SHARE:.0%}"
    if problem := sharding_obstacle(recipe, inputs):
        return Strategy("ddp", f"{texts}; but {problem}")
    return Strategy("fsdp", texts)


def forms_of(recipe: Recipe, model: PeftModel, batches: BatchPlan, *, on_cpu: bool = False) -> list[Form]:
    """Return the forms of the memory ladder that a run has, the fastest first."""
    base = model.get_base_model()
    rungs = all_rungs(
        setting=recipe.training.gradient_checkpointing,
        can_recompute=recipe.adapter.method != "prefix" and base.supports_gradient_checkpointing,
        on_cpu=on_cpu,
        max_parts=batches.max_rows,
        parts_first=min(batches.parts, batches.max_rows),
    )
    return [Form(rung.describe(), rung.every, rung.offload, _tokens_of(batches, rung.parts)) for rung in rungs]


def full_batch_form(forms: Sequence[Form], batches: BatchPlan) -> Form:
    """Return the smallest of the forms that divide no batch and need no transfer to the host."""
    tokens = _tokens_of(batches, min(batches.parts, batches.max_rows))
    return [form for form in forms if form.tokens >= tokens and not form.offload][-1]


def _tokens_of(batches: BatchPlan, parts: int) -> int:
    """Return the tokens that run at a time of batches in `parts`."""
    return int(batches.rows.lengths.max()) if parts >= batches.max_rows else batches.tokens_of_part(parts)


def sharding_obstacle(recipe: Recipe, inputs: RunInputs) -> str:
    """Return what keeps the base of a run from being sharded; empty if nothing does."""
    name = recipe.distributed.strategy if recipe.distributed.strategy in SHARDED else "fsdp"
    if (conflict := next(sharding_conflicts(recipe), None)) is not None:
        return conflict.message
    if inputs.prequantized is not None:
        return f"{name} cannot shard a checkpoint that is quantized already"
    if inputs.base.source.packed:
        return f"{name} cannot shard a packed GGUF base"
    problem = sharding_problem(inputs.base, recipe.quantization)
    return f"{name} cannot shard this base: {problem}" if problem else ""


def _required(recipe: Recipe, inputs: RunInputs) -> str:
    """Return why a recipe that requests fsdp or hsdp gets it.

    Raises:
        LoraError: the base cannot be sharded.
    """
    if problem := sharding_obstacle(recipe, inputs):
        raise LoraError(f"{KEY}: {problem}", hint="write strategy: ddp")
    return "set in the recipe"


def check_offload(recipe: Recipe, *, processes: int) -> None:
    """Check `distributed.cpu_offload` against the number of processes, on GPUs.

    Raises:
        LoraError: there is one, which has no other to share the base with.
    """
    if recipe.distributed.cpu_offload and processes == 1:
        raise LoraError(
            f"{OFFLOAD_KEY}: the base waits in host memory only if it is sharded, and one process has nothing to shard",
            hint="write cpu_offload: false; or start a process on each of several GPUs",
        )


def _offload(recipe: Recipe, inputs: RunInputs, *, processes: int) -> str:
    """Return what a run with cpu_offload takes of the host memory, for the line on its strategy.

    Raises:
        LoraError: one process has no other to share the base with, or the host memory is too small.
    """
    if inputs.device.type == "cpu":
        return "; cpu_offload has no effect on the CPU, where the base is in host memory anyway"
    check_offload(recipe, processes=processes)
    weights = stored_weights(inputs.base.skeleton(), dtype=inputs.base.dtype, quantization=recipe.quantization)
    shards = processes_of_machine(processes) if recipe.distributed.strategy == "hsdp" else processes
    need = offloaded_bytes(weights, shards)
    free = memory.free_for_process(torch.device("cpu"), processes_of_machine(processes))
    texts = f"{console.format_bytes(need)} of host memory for the layers of each process"
    if need + memory.PROCESS_BYTES > MAX_SHARE * free:
        raise LoraError(
            f"{OFFLOAD_KEY}: it needs {texts}, and {console.format_bytes(memory.PROCESS_BYTES)} for the process, which "
            f"is more than {MAX_SHARE:.0%} of the {console.format_bytes(free)} free for each on this machine",
            hint="add machines; quantize the base (quantization: {bits: 4}); or write cpu_offload: false",
            exit_code=1,
        )
    return f"; cpu_offload: {texts}"


def _needed(recipe: Recipe, inputs: RunInputs, plan: BatchPlan) -> int:
    """Return the bytes of a full model and its step, in the smallest form that does not divide batches."""
    model = adapted_skeleton(recipe, inputs)
    of_run = memory_of_run(recipe, inputs, model, optimizer=resolve_optimizer(recipe, inputs))
    forms = forms_of(recipe, model, plan, on_cpu=inputs.device.type == "cpu")
    return full_model_bytes(of_run, full_batch_form(forms, plan), processes=plan.processes)


def _trained_modules(recipe: Recipe, inputs: RunInputs) -> tuple[str, ...]:
    """Return the modules that the adapter trains in full, and embeddings or head if they carry it, by full name."""
    before = inputs.base.skeleton()
    ends = {before.get_input_embeddings(), before.get_output_embeddings()}
    names = {name: type(module) for name, module in before.named_modules() if module in ends}
    if "virtual_tokens" in METHOD_FACTS[recipe.adapter.method].options:
        return tuple(names)  # PEFT looks up the embeddings of the tokens itself
    adapted = dict(adapted_skeleton(recipe, inputs).get_base_model().named_modules())
    wrapped = [name for name, module in adapted.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    return tuple(dict.fromkeys([*wrapped, *(name for name, kind in names.items() if type(adapted[name]) is not kind)]))
