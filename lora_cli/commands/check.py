"""`lora check`: validate a recipe against rows and model (label mask, target modules, memory) without weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from lora_cli.data.batches import BatchPlan
from lora_cli.data.dataset import show_mask
from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.data.token_text import token_texts
from lora_cli.model import attach_adapter, continue_adapter, memory, target_modules
from lora_cli.model.base_model import task_heads
from lora_cli.model.gpu_plan import Form, StrategyPlan, plan_strategies
from lora_cli.model.quantize import check_cpu_widths
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.disk_space import free_bytes
from lora_cli.run.redact import redact_path
from lora_cli.setup.coverage import adapter_coverage
from lora_cli.setup.evaluations import check_steps
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs
from lora_cli.setup.planned_gpus import (
    GPU,
    GPUS_OF_MACHINE,
    PlannedGpus,
    changes_that_help,
    check_planned,
    host_bytes,
    on_planned_gpus,
    planned_gpus,
    planned_sharding,
)
from lora_cli.setup.run_size import SMALLER, run_needs
from lora_cli.setup.strategy import choose_strategy, forms_of, full_batch_form, planned_strategy, sharding_obstacle
from lora_cli.setup.tracked_run import describe_tracking
from lora_cli.setup.training_memory import memory_of_run
from lora_cli.setup.training_model import (
    adapter_context,
    check_before_rows,
    check_new_tokens_trainable,
    choose_performance,
    describe_quantization,
    open_source,
    resolve_optimizer,
)
from lora_cli.training.launch import resolve_processes
from lora_cli.training.memory_ladder import check_can_recompute


def check(recipe: Recipe, *, rows: int, gpus: int | None = None, budget: int | None = None) -> dict[str, Any]:
    """Print ledger, `rows` rows token by token, steps, target modules and memory plan; return the figures for JSON.

    With `gpus` or `budget`, bytes of memory of each, the plan is for these GPUs, which this machine need not have.

    Raises:
        LoraError: recipe, rows, model or planned GPUs do not fit together, or the GPUs are not described.
    """
    out = console.out.print
    planned = planned_gpus(gpus, budget)
    if planned:
        check_planned(recipe, planned)
    check_before_rows(recipe, device=GPU if planned else None)
    inputs = load_inputs(recipe, info=console.info, weights=False)
    if planned:
        inputs = on_planned_gpus(recipe, inputs)
    recipe = inputs.recipe
    optimizer = resolve_optimizer(recipe, inputs)
    for line in inputs.data.ledger.table():
        out(line)
    for number in range(min(rows, len(inputs.data.train))):
        out(_row_text(inputs.data.train[number], inputs, recipe))
    if rows and recipe.task == "causal-lm":
        out("(bold green carries loss)" if console.out.is_terminal else "([[ ]] carries loss)")
    processes = planned.number if planned else resolve_processes(recipe.distributed)
    plan = batch_plan(recipe, inputs, inputs.data.train, processes=processes)
    total = plan.steps_in(epochs=recipe.training.epochs, max_steps=recipe.training.max_steps)
    out(
        f"steps: {total:,} in {f'{processes} processes' if processes > 1 else 'one process'}, "
        f"{plan.steps_per_epoch:,} per epoch; "
        f"{plan.token_share:.1%} of each batch is tokens"
    )
    for line in plan.describe(total)[1:]:
        out(line)
    strategy = None if planned else choose_strategy(recipe, inputs, plan)
    if strategy and strategy.why:
        out(f"strategy: {strategy.name} ({strategy.why})")
    if recipe.training.optimizer == "auto":
        out(f"optimizer: {optimizer} (auto)")
    sharded = strategy is not None and strategy.name != "ddp"
    for choice in choose_performance(recipe, inputs, batches=total * plan.batches_of_device, sharded=sharded):
        out(choice.line())
    check_steps(recipe, total=total, held_out=inputs.data.eval is not None, info=out)
    for line in describe_tracking(recipe):
        out(line)
    sizes = _print_sizes(recipe, inputs, plan, total=total, optimizer=optimizer, planned=planned)
    out(f"ok: lora train would train {redact_path(recipe.model.path)} on these rows")
    return {
        "model": redact_path(recipe.model.path),
        "task": recipe.task,
        "ledger": inputs.data.ledger.to_json(),
        "processes": processes,
        "steps": total,
        "steps_per_epoch": plan.steps_per_epoch,
        "token_share": plan.token_share,
        "strategy": strategy.name if strategy else None,
        "optimizer": optimizer,
        **sizes,
    }


def _print_sizes(
    recipe: Recipe,
    inputs: RunInputs,
    batches: BatchPlan,
    *,
    total: int,
    optimizer: str,
    planned: PlannedGpus | None,
) -> dict[str, Any]:
    """Print target modules and memory plan, computed from the modules' shapes on the meta device; return the sizes."""
    model = inputs.base.skeleton()
    heads = task_heads(model, recipe.task)
    layers = target_modules.linear_layers(model, heads)
    if recipe.quantization is not None and recipe.quantization.bits == 4 and inputs.device.type == "cpu":
        check_cpu_widths(model, layers)
    check_new_tokens_trainable(recipe, model)
    check_can_recompute(model, recipe.training.gradient_checkpointing)
    context = adapter_context(recipe, inputs, heads=heads, plan=None, total=total)
    adapted = attach_adapter.attach(model, recipe.adapter, seed=recipe.training.seed, context=context)
    source = open_source(recipe, inputs, info=console.info)
    if source is not None and not source.config.is_prompt_learning:  # whose tensors are computed, not stored
        continue_adapter.check_fits(adapted, source)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    coverage = adapter_coverage(adapted, layers, trainable, recipe.adapter)
    for line in [*describe_quantization(recipe, inputs), *coverage.table()]:
        console.out.print(line)
    of_run = memory_of_run(recipe, inputs, adapted, optimizer=optimizer)
    if of_run.activations.unmeasured:
        console.out.print(
            f"note: activations are a rough estimate, because {type(model).__name__} does not run without weights: "
            f"{of_run.activations.unmeasured}"
        )
    if planned:
        forms = forms_of(recipe, adapted, batches)
        needed = _print_gpu_plan(recipe, inputs, of_run, forms, planned, full=full_batch_form(forms, batches))
    else:
        needed = _print_memory(recipe, of_run, batches, free=memory.available_memory(inputs.device))
    disk = _print_disk(recipe, adapted, base=Path(inputs.base.source.path), optimizer=optimizer, total=total)
    return {"trainable_parameters": trainable, "memory": needed, "disk": disk}


def _print_memory(recipe: Recipe, of_run: memory.TrainingMemory, batches: BatchPlan, *, free: int) -> dict[str, Any]:
    """Print the memory of a step on this machine, of which `free` bytes are free; return the bytes."""
    tokens = batches.tokens_of_part(batches.parts)
    plan = of_run.plan(tokens, every=1 if recipe.training.gradient_checkpointing is True else None)
    parts = ", ".join(f"{name} {console.format_bytes(value)}" for name, value in plan._asdict().items() if value)
    total_memory, free_memory = console.format_bytes(plan.total), console.format_bytes(free)
    console.out.print(f"memory, estimated: {total_memory} ({parts}); free now: {free_memory}")
    smaller = "data.max_length" if batches.parts > 1 else "training.tokens_per_batch"
    if batches.parts > 1:
        console.out.print(
            f"  with batches of up to {tokens:,} tokens; tokens_per_batch: auto takes up to {batches.max_tokens:,} "
            "where they fit"
        )
    if plan.total > free:
        console.out.print(
            "  more than is free: with gradient_checkpointing: auto, layers are recomputed, and then batches run in "
            f"more parts; smaller batches ({smaller}), quantization or a smaller adapter.rank need less"
        )
    return {"bytes": plan.total, "parts": plan._asdict(), "tokens": tokens, "free_bytes": free}


def _print_gpu_plan(
    recipe: Recipe,
    inputs: RunInputs,
    of_run: memory.TrainingMemory,
    forms: list[Form],
    gpus: PlannedGpus,
    *,
    full: Form,
) -> dict[str, Any]:
    """Print what training takes on each of the planned GPUs, for each strategy and form, and which ones fit.

    `full` is the smallest form of whole batches.
    """
    plans = plan_strategies(of_run, forms, gpus=gpus.number, budget=gpus.memory, sharding=planned_sharding(recipe))
    console.out.print(f"memory of each GPU, estimated, for {gpus.describe()}:")
    names = [plan.name for plan in plans] if len(plans) > 1 else ["one GPU"]
    _print_columns(["", *names], _part_rows(of_run, forms[0], plans))
    console.out.print("with saved activations, and the most tokens at a time that fit:")
    columns = [column for name in names for column in (name, "fits")]
    _print_columns(["", "tokens", "activations", *columns], _form_rows(of_run, plans))
    for name, plan in zip(names, plans, strict=True):
        best = plan.best
        if best is None:
            console.out.print(f"{name}: no form fits")
            continue
        host, machine = console.format_bytes(host_bytes(of_run, plan, gpus)), min(gpus.number, GPUS_OF_MACHINE)
        console.out.print(
            f"{name}: {best.form.name}: {console.format_bytes(best.total)}, {best.total / gpus.memory:.0%} of a GPU; "
            f"host memory of a machine with {machine} of them: {host} at least"
        )
    if gpus.number > 1:
        strategy = planned_strategy(recipe, inputs, of_run, full, gpus=gpus.number, budget=gpus.memory)
        console.out.print(f"strategy: {strategy.name} ({strategy.why})")
    if all(plan.best is None for plan in plans):
        console.out.print("what would need less:")
        shardable = not sharding_obstacle(recipe, inputs)
        for line in changes_that_help(recipe, inputs, of_run, plans, gpus, shardable=shardable):
            console.out.print(f"  {line}")
    strategies = {
        plan.name: [{**form.form._asdict(), "bytes": form.total, "fits": form.fits} for form in plan.forms]
        for plan in plans
    }
    return {"gpus": gpus.number, "bytes_of_gpu": gpus.memory, "strategies": strategies}


def _print_columns(headers: list[str], rows: Iterator[tuple[str, ...]]) -> None:
    """Print a table without lines, all columns but the first right-aligned."""
    table = Table(box=None, pad_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left")
    for name, *values in rows:
        table.add_row(f"  {name}", *values)
    console.print_table(table)


def _part_rows(of_run: memory.TrainingMemory, first: Form, plans: list[StrategyPlan]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the parts, without activations; `first` is the form whose tokens they are for."""
    names = {
        "weights": "weights, as stored",
        "constants": "scales of quantized weights",
        "adapter": "adapter",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "paged": "(optimizer state, where it fits; else in host memory)",
        "in_host": "(layers, in host memory: cpu_offload)",
        "gathered": "layers gathered from other GPUs",
        "exchanged": "(gradients exchanged, after activations are freed)",
        "context": "CUDA and its libraries",
    }
    for field, name in names.items():
        values = [getattr(plan.parts, field) for plan in plans]
        if any(values):
            yield name, *(console.format_bytes(value) if value else "-" for value in values)
    step = of_run.plan(first.tokens)
    yield "logits", *(console.format_bytes(step.logits) for _ in plans)
    yield "temporary tensors of one layer", *(console.format_bytes(step.temporary) for _ in plans)


def _form_rows(of_run: memory.TrainingMemory, plans: list[StrategyPlan]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the forms: those that run whole batches, and parts of batches as far as they are needed."""
    fitting = [[each.fits for each in plan.forms] for plan in plans]
    needed = max(fits.index(True) if True in fits else 0 for fits in fitting)
    for number, (form, *_) in enumerate(plans[0].forms):
        if number > needed and form.tokens < plans[0].forms[0].form.tokens:
            break
        saved = of_run.plan(form.tokens, every=form.every, offload=form.offload).activations
        totals = [plan.forms[number] for plan in plans]
        cells = [cell for each in totals for cell in (console.format_bytes(each.total), f"{each.largest:,}")]
        yield form.name, f"{form.tokens:,}", console.format_bytes(saved), *cells


def _print_disk(recipe: Recipe, model: nn.Module, *, base: Path, optimizer: str, total: int) -> dict[str, Any]:
    """Print the disk space that the run needs, and what is free; return the bytes."""
    run = Path(recipe.output)
    needs = run_needs(run, model, recipe.training, optimizer=optimizer, base=base, total=total)
    parts = ", ".join(f"{need.what.removeprefix('the ')} {console.format_bytes(need.bytes)}" for need in needs)
    free, needed = free_bytes(run), sum(need.bytes for need in needs)
    left = "unknown" if free is None else console.format_bytes(free)
    console.out.print(f"disk, estimated: {console.format_bytes(needed)} ({parts}) in {run}; free now: {left}")
    if free is not None and needed > free:
        console.out.print(f"  more than is free: {SMALLER}")
    return {"bytes": needed, "free_bytes": free}


def _row_text(row: Row, inputs: RunInputs, recipe: Recipe) -> Text:
    """Return a row as the model sees it: for language models token by token, else its text and labels."""
    tokenizer = inputs.base.tokenizer
    match recipe.task:
        case "causal-lm":
            return _masked_text(row, inputs)
        case "seq2seq-lm":
            target = "".join(token_texts([int(token) for token in row.labels], tokenizer))
            return Text(f"{row.where}: {''.join(token_texts(row.input_ids.tolist(), tokenizer))} -> {target}")
        case "seq-cls":
            text = "".join(token_texts(row.input_ids.tolist(), tokenizer))
            return Text(f"{row.where}: {text} -> {_label_text(row, inputs)}")
        case _:
            return _tagged_text(row, inputs)


def _label_text(row: Row, inputs: RunInputs) -> str:
    labels = inputs.data.labels
    assert labels is not None
    if labels.kind == "regression":
        return ", ".join(f"{value:g}" for value in row.labels)
    if labels.kind == "multi":
        return ", ".join(name for name, on in zip(labels.names, row.labels, strict=True) if on) or "(none)"
    return labels.names[int(row.labels[0])]


def _tagged_text(row: Row, inputs: RunInputs) -> Text:
    labels = inputs.data.labels
    assert labels is not None
    text = Text(f"{row.where}:")
    words = token_texts(row.input_ids.tolist(), inputs.base.tokenizer)
    for word, label in zip(map(str.strip, words), row.labels.tolist(), strict=True):
        tag = "" if label == IGNORE_INDEX else f"[{labels.names[label]}]"
        if word or tag:  # of the tokens of one character, the first has its text
            text.append(f" {word}{tag}")
    return text


def _masked_text(row: Row, inputs: RunInputs) -> Text:
    """Return the row's text with supervised tokens in bold green, or between [[ and ]] if there is no color."""
    text = Text(f"{row.where}: ")
    color, inside = console.out.is_terminal, False
    for token, supervised in show_mask(row, inputs.base.tokenizer):
        if not color and supervised != inside:
            text.append("[[" if supervised else "]]")
        inside = supervised
        text.append(token, style="bold green" if supervised else "dim")
    if inside and not color:
        text.append("]]")
    return text
