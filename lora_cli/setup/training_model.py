"""Build the model that a recipe describes: base, attention, adapter, dtypes, checkpointing; print the choices."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import (
    attach_adapter,
    continue_adapter,
    memory,
    quantization_report,
    select_attention,
    target_modules,
)
from lora_cli.model.adapter_context import AdapterContext, StateDict
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.base_model import BaseCheckpoint, task_heads
from lora_cli.model.compile_layers import CompileChoice, choose_compile, compile_layers
from lora_cli.model.device import pick_device
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.kernels import KernelChoice, apply_kernels, choose_kernels
from lora_cli.model.loss import LossFunction
from lora_cli.model.quantize import quantized_bytes
from lora_cli.model.sharded_base import load_sharded
from lora_cli.model.sharding import gathered_bytes, is_sharded
from lora_cli.model.trained_on import Origin
from lora_cli.recipe.schema import AdapterSpec, Recipe
from lora_cli.run import console
from lora_cli.run.redact import redact_path
from lora_cli.run.worker import processes_of_machine
from lora_cli.setup.adapter_folders import find_adapter
from lora_cli.setup.coverage import AdapterCoverage, adapter_coverage
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.tracked_run import check_trackers_installed
from lora_cli.setup.training_memory import memory_of_run
from lora_cli.training.gpu import set_up_gpu
from lora_cli.training.memory_ladder import MemoryLadder
from lora_cli.training.optimizer import choose_optimizer, state_bytes, trained_shapes
from lora_cli.training.process_group import shard_mesh

Info = Callable[[str], None]
MAX_SHARE = 0.9  # of the free memory that an estimate may take
HEAP_SHARE = 0.5  # the same for batches that are larger than necessary: a heap leaves gaps between its tensors
ENOUGH_STEPS = 1_000  # for AdaLoRA's schedule, which has no effect on shapes
MAX_PADDING_EFFECT = 0.05  # relative change of a row's logits next to a longer row; rounding in bf16 is well below


class BaseForTraining(NamedTuple):
    """The base model, ready to be measured or adapted."""

    model: PreTrainedModel
    heads: tuple[str, ...]  # modules that are fully trained with any adapter
    leak_check: select_attention.LeakCheck | None  # with packing: result of the check for leaks between packed rows


class TrainableModel(NamedTuple):
    """The model with its adapter, ready to train."""

    model: PeftModel
    trainable: int  # parameters
    leak_check: select_attention.LeakCheck | None
    optimizer: str  # name that training.optimizer resolves to
    origins: list[Origin]  # adapters that training goes on from, the oldest first; empty for a new adapter
    ladder: MemoryLadder
    performance: dict[str, str]  # each switch of speed that was chosen, and why
    coverage: AdapterCoverage


def load_base(
    recipe: Recipe, inputs: RunInputs, *, info: Info = console.no_output, whole: Sequence[str] | None = None
) -> BaseForTraining:
    """Load the frozen base with the head of the task, choose its attention, and with packing, check for leaks.

    With `whole`, it is sharded over all processes, but for these modules.

    Raises:
        LoraError: it cannot be loaded, or no attention works on it.
    """
    return prepare_base(inputs.base, recipe, inputs.device, info=info, whole=whole)


def prepare_base(
    base: BaseCheckpoint,
    recipe: Recipe,
    device: torch.device,
    *,
    info: Info = console.no_output,
    whole: Sequence[str] | None = None,
) -> BaseForTraining:
    """Load a checkpoint as `load_base` does, in place of the run's base; a merged model, for example.

    Raises:
        LoraError: it cannot be loaded, or no attention works on it.
    """
    attention = None if recipe.model.attention == "auto" else recipe.model.attention
    if whole is None:
        loaded = base.load(device, attention=attention, quantization=recipe.quantization, seed=recipe.training.seed)
    else:
        loaded = load_sharded(
            base,
            device,
            shard_mesh(device, of_machine=recipe.distributed.strategy == "hsdp"),
            attention=attention,
            quantization=recipe.quantization,
            whole=whole,
            cpu_offload=recipe.distributed.cpu_offload,
        )
    for note in loaded.notes:
        info(note)
    leak_check = select_attention.choose_attention(
        loaded.model, recipe.model.attention, packing=bool(recipe.data.packing), causal=base.task == "causal-lm"
    )
    return BaseForTraining(loaded.model, loaded.heads, leak_check)


def adapter_context(
    recipe: Recipe, inputs: RunInputs, *, heads: tuple[str, ...], plan: BatchPlan | None, total: int
) -> AdapterContext:
    """Return the context that the adapter is created in; `plan` is None if only shapes are needed."""
    return AdapterContext(
        task=recipe.task,
        heads=heads,
        total_steps=total,
        plan=plan,
        encode=partial(_encode, inputs.base),
        unquantized_weights=partial(_unquantized_weights, inputs.base, recipe.training.seed),
    )


def adapted_skeleton(recipe: Recipe, inputs: RunInputs) -> PeftModel:
    """Return the model of a run with its adapter on the meta device: its shapes, whatever the steps of the run."""
    model = inputs.base.skeleton()
    heads = task_heads(model, recipe.task)
    context = adapter_context(recipe, inputs, heads=heads, plan=None, total=ENOUGH_STEPS)
    return attach_adapter.attach(model, recipe.adapter, seed=recipe.training.seed, context=context)


def _encode(base: BaseCheckpoint, text: str) -> list[int]:
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _unquantized_weights(base: BaseCheckpoint, seed: int) -> StateDict:
    """Return the base's weights before quantization, on the CPU."""
    weights: StateDict = base.load(torch.device("cpu"), seed=seed).model.state_dict()
    return weights


def build_model(
    recipe: Recipe,
    inputs: RunInputs,
    plan: BatchPlan,
    *,
    total: int,
    info: Info,
    whole: Sequence[str] | None = None,
) -> TrainableModel:
    """Load the base, choose its attention, attach the adapter, and print the choices.

    With `whole`, the base is sharded over all processes, but for these modules.

    Raises:
        LoraError: a part of the recipe does not fit the model or this machine.
    """
    if inputs.device.type == "cuda":
        set_up_gpu(inputs.base.dtype)
    optimizer = resolve_optimizer(recipe, inputs)
    source = open_source(recipe, inputs, info=info)
    sharded, batches = whole is not None, total * plan.batches_of_device
    kernels, compiled = choose_performance(recipe, inputs, batches=batches, sharded=sharded)
    base, heads, leak_check = load_base(recipe, inputs, info=info, whole=whole)
    kernels = apply_kernels(base, kernels, setting=recipe.performance.kernels)
    layers = target_modules.linear_layers(base, heads)
    check_new_tokens_trainable(recipe, base)
    context = adapter_context(recipe, inputs, heads=heads, plan=plan, total=total)
    model = attach_adapter.attach(base, recipe.adapter, seed=recipe.training.seed, context=context)
    tensors = continue_adapter.check_fits(model, source) if source else {}
    if source:
        continue_adapter.load_source_tensors(model, tensors)
    device = f"{str(inputs.base.dtype).removeprefix('torch.')} on {inputs.device}"
    info(f"{redact_path(recipe.model.path)}: {device}, attention {base.config._attn_implementation}")
    for line in describe_quantization(recipe, inputs):
        info(line)
    size, weights = quantized_bytes(base)
    if weights:
        info(f"  {weights:,} weights in {console.format_bytes(size)}: {size / weights:.3f} bytes each")
    if leak_check:
        leak = f"{leak_check.leak:.0e} of their size" if leak_check.leak else "0"
        info(f"packing check: no leakage between packed rows (largest logit change: {leak})")
    if recipe.training.optimizer == "auto":
        info(f"optimizer: {optimizer} (auto)")
    trainable = _count_trainable(model)
    coverage = adapter_coverage(model, layers, trainable, recipe.adapter)
    for line in coverage.table():
        info(line)
    optimizer_bytes = state_bytes(optimizer, trained_shapes(model))
    ladder = _memory_ladder(recipe, inputs, model, plan, optimizer_bytes, info)
    upcast_trainable_params(model)
    origins = []
    if source:
        continue_adapter.load_exact_tensors(model, source, tensors)
        origins = source.origins_up_to(redact_path(str(recipe.adapter.source)))
        step = "" if source.step is None else f", step {source.step}"
        info(f"adapter: goes on from {source.folder}{step}, {len(origins)} in its chain; the optimizer starts anew")
    probe = plan.make_batch([int(inputs.data.train.lengths[:64].argmin())])
    loss_fn = LossFunction(model, task=recipe.task)
    attach_adapter.check_gradients_reach(model, lambda: loss_fn(probe).loss)
    if compiled.on:
        compiled = compile_layers(base, lambda: loss_fn(probe).loss, setting=recipe.performance.compile)
    if recipe.task == "seq-cls" and model.active_peft_config.is_prompt_learning:
        _check_padding(model, recipe, inputs, plan)
    for choice in (kernels, compiled):
        info(choice.line())
    performance = {"kernels": kernels.line(), "compile": compiled.line()}
    trainable = _count_trainable(model)
    return TrainableModel(model, trainable, leak_check, optimizer, origins, ladder, performance, coverage)


def choose_performance(
    recipe: Recipe, inputs: RunInputs, *, batches: int, sharded: bool = False
) -> tuple[KernelChoice, CompileChoice]:
    """Return the kernels of a run of `batches` device batches, and whether its layers are compiled: not if sharded.

    Raises:
        LoraError: the recipe names kernels that cannot be used here.
    """
    spec, model_type = recipe.performance, inputs.base.config.model_type
    kernels = choose_kernels(spec.kernels, model_type=model_type, device=inputs.device, task=recipe.task)
    dropout = bool(recipe.adapter.dropout)
    if sharded:
        return kernels, CompileChoice(False, "the base is sharded")
    return kernels, choose_compile(spec.compile, device=inputs.device, batches=batches, dropout=dropout)


def open_source(recipe: Recipe, inputs: RunInputs, *, info: Info) -> AdapterFiles | None:
    """Open the adapter that the recipe goes on from, checked against recipe and base; None for a new adapter.

    Raises:
        LoraError: it cannot be trained on with this recipe and base.
    """
    source = find_source(recipe.adapter)
    if source:
        for note in continue_adapter.check_base(source, inputs.base, quantization=recipe.quantization):
            info(note)
    return source


def find_source(spec: AdapterSpec) -> AdapterFiles | None:
    """Find the adapter that `spec` goes on from, checked against its keys; None for a new adapter.

    Raises:
        LoraError: there is no such adapter, it cannot be continued, or a key of the recipe disagrees with it.
    """
    if spec.source is None:
        return None
    try:
        source = open_adapter(find_adapter(Path(spec.source)))
    except LoraError as error:
        raise LoraError(f"{continue_adapter.KEY}: {error.message}", hint=error.hint) from None
    continue_adapter.check_source(spec, source)
    return source


def check_before_rows(recipe: Recipe, device: torch.device | None = None) -> None:
    """Check what needs neither rows nor base, because the rows can take minutes: trackers, optimizer and adapter.from.

    `device` is that of the run; None for this machine's.

    Raises:
        LoraError: a tracker is not installed, the optimizer does not work on this machine, or there is no adapter to
            go on from.
    """
    check_trackers_installed(recipe.tracking)
    choose_optimizer(recipe.training.optimizer, device=device or pick_device())
    find_source(recipe.adapter)


def _count_trainable(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_padding(model: PeftModel, recipe: Recipe, inputs: RunInputs, plan: BatchPlan) -> None:
    """Raise if padding changes the class of a row: with virtual tokens, transformers may read a padding position.

    Decoders read the class at the last token, and count positions without the virtual tokens.
    """
    lengths = inputs.data.train.lengths[:64]
    short, long = int(lengths.argmin()), int(lengths.argmax())
    if recipe.training.batch_size == 1 or lengths[short] == lengths[long]:
        return
    loss_fn = LossFunction(model, task=recipe.task)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone, padded = (loss_fn.logits(plan.make_batch(rows))[0].float() for rows in ([short], [short, long]))
    model.train(training)
    if float((alone - padded).abs().max() / alone.abs().max().clamp_min(1e-12)) > MAX_PADDING_EFFECT:
        raise LoraError(
            f"adapter.method: with {recipe.adapter.method} this model reads the class of a shorter row at its padding",
            hint="set training.batch_size: 1 and raise training.gradient_accumulation, or write method: prefix or lora",
        )


def check_new_tokens_trainable(recipe: Recipe, model: PreTrainedModel) -> None:
    """Check that the embeddings of new tokens are trained; the recipe's rules check adapter.trainable_tokens alone.

    Raises:
        LoraError: the embedding of a new token would not be trained.
    """
    spec = recipe.adapter
    untrained = [token for token in recipe.model.new_tokens if token not in (spec.trainable_tokens or ())]
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if untrained and embeddings not in target_modules.find_modules(model, spec.modules_to_save or ()):
        raise LoraError(
            f"model.new_tokens: {untrained[0]!r} is not trainable: adapter.modules_to_save does not have {embeddings}",
            hint=f"add {embeddings.rpartition('.')[2]} to it, and the head if it is not tied; "
            "or list the token in adapter.trainable_tokens",
        )


def resolve_optimizer(recipe: Recipe, inputs: RunInputs) -> str:
    """Return the name of the optimizer that the recipe requests, or that `auto` chooses here.

    Raises:
        LoraError: it does not work on this machine.
    """
    return choose_optimizer(recipe.training.optimizer, device=inputs.device)


def describe_quantization(recipe: Recipe, inputs: RunInputs) -> list[str]:
    """Return lines on how the base's weights are stored in memory; empty if in the dtype of the run."""
    if recipe.quantization is None and inputs.prequantized is None:
        return []
    base = inputs.base
    return quantization_report.describe_quantization(
        base.skeleton(), recipe.quantization, existing=inputs.prequantized, dtype=base.dtype
    )


def _memory_ladder(
    recipe: Recipe, inputs: RunInputs, model: PeftModel, plan: BatchPlan, optimizer_bytes: int, info: Info
) -> MemoryLadder:
    """Return the memory ladder of a run; on the CPU, with the first rung whose estimate fits."""
    base = model.get_base_model()
    ladder = MemoryLadder(
        base,
        setting=recipe.training.gradient_checkpointing,
        # Its keys and values are in the cache, and recomputation runs without a cache.
        can_recompute=recipe.adapter.method != "prefix",
        use_reentrant=getattr(base, "is_loaded_in_8bit", False),
        max_parts=plan.max_rows,
        reserve=optimizer_bytes,
        info=info,
        parts_first=plan.parts,
    )
    auto = recipe.training.tokens_per_batch == "auto"
    if auto:
        info(f"tokens_per_batch: auto: a step of a device is one batch of up to {plan.max_tokens:,} tokens")
    # On a GPU, the largest batch is tried; not if the base is sharded, as one process alone cannot try again.
    tried = inputs.device.type != "cpu" and not is_sharded(model)
    if (recipe.training.gradient_checkpointing != "auto" and not auto) or tried:
        return ladder
    free = memory.free_for_process(inputs.device, processes_of_machine(plan.processes)) - gathered_bytes(model)
    rungs = [rung for rung in (ladder.rung, *ladder.below()) if rung.parts <= plan.parts]
    of_run = memory_of_run(
        recipe,
        inputs,
        adapted_skeleton(recipe, inputs),
        optimizer=resolve_optimizer(recipe, inputs),
        attention=base.config._attn_implementation,
    )
    needs = {
        rung: of_run.plan(plan.tokens_of_part(rung.parts), every=rung.every, offload=rung.offload) for rung in rungs
    }
    # The weights are loaded already, so the free memory has to fit everything else.
    rest = {rung: need.total - need.loaded for rung, need in needs.items()}
    shares = {rung: HEAP_SHARE if rung.parts < plan.parts else MAX_SHARE for rung in rungs}
    fitting = next((rung for rung in rungs if rest[rung] <= shares[rung] * free), rungs[-1])
    if fitting != ladder.rung:
        need, left = console.format_bytes(rest[ladder.rung]), console.format_bytes(free)
        share = f", of which larger batches may take {HEAP_SHARE:.0%}" if auto else ""
        info(f"memory: {fitting.describe()}, as a step without it needs about {need} and {left} is free{share}")
        ladder.set(fitting)
    return ladder
