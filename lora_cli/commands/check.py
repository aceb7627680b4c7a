"""`lora check`: all that can be known of a run before weights are loaded."""

from pathlib import Path

from rich.text import Text
from transformers import PreTrainedModel

from lora_cli.data.dataset import IGNORE_INDEX, Row, show_mask
from lora_cli.data.examples import check_rows
from lora_cli.model import attach_adapter, base_model, memory, target_modules
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.run import console
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs
from lora_cli.setup.training_model import (
    check_new_tokens_trainable,
    context,
    coverage_table,
    describe_quantization,
    resolve_optimizer,
)
from lora_cli.training import model_card
from lora_cli.training.optimizer import moment_bytes


def check(recipe: Recipe, *, rows: int) -> None:
    """Print the ledger, `rows` rows token by token, the steps, the target modules and the memory plan."""
    info = console.out.print
    opening = load_inputs(recipe, info=console.info, weights=False)
    optimizer = resolve_optimizer(recipe, opening)
    for line in opening.data.ledger.table():
        info(line)
    for number in range(min(rows, len(opening.data.train))):
        info(_shown(opening.data.train[number], opening, recipe))
    if rows and recipe.task == "causal-lm":
        info("(bold green carries loss)" if console.out.is_terminal else "([[ ]] carries loss)")
    plan = batch_plan(recipe, opening, opening.data.train, batches_per_step=recipe.training.gradient_accumulation)
    total = plan.steps_in(epochs=recipe.training.epochs, max_steps=recipe.training.max_steps)
    info(
        f"steps: {total:,} in one process, {plan.steps_per_epoch:,} an epoch; "
        f"{plan.token_share:.1%} of what the batches compute is tokens"
    )
    if recipe.training.optimizer == "auto":
        info(f"optimizer: {optimizer} (auto)")
    _count(recipe, opening, tokens=plan.max_tokens, total=total, optimizer=optimizer)
    info(f"ok: lora train would train {model_card.redact_path(recipe.model.path)} on these rows")


def _count(recipe: Recipe, opening: RunInputs, *, tokens: int, total: int, optimizer: str) -> None:
    """Target modules and the memory plan, from the modules' shapes on the meta device."""

    def skeleton() -> PreTrainedModel:
        return base_model.skeleton(
            base_model.load_config(opening.source),
            trust_remote_code=recipe.model.trust_remote_code,
            task=recipe.task,
            labels=opening.data.labels,
            vocabulary=len(opening.tokenizer) if recipe.model.new_tokens else 0,
        )

    model = skeleton()
    heads = base_model.task_heads(model, recipe.task)
    layers = target_modules.linear_layers(model, heads)
    check_new_tokens_trainable(recipe, model)
    adapted = attach_adapter.attach(
        model,
        recipe.adapter,
        seed=recipe.training.seed,
        context=context(recipe, opening, heads=heads, plan=None, total=total),
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for line in [*describe_quantization(recipe, opening), *coverage_table(adapted, layers, trainable)]:
        console.out.print(line)
    plan = memory.plan_memory(
        skeleton(),
        dtype=opening.dtype,
        trainable=trainable,
        tokens=tokens,
        longest=int(opening.data.train.lengths.max()),
        checkpointing=recipe.training.gradient_checkpointing is True,
        quantization=recipe.quantization,
        on_cpu=opening.device.type == "cpu",
        moment_bytes=moment_bytes(optimizer),
    )
    parts = ", ".join(f"{name} {console.format_bytes(value)}" for name, value in plan._asdict().items() if value)
    free = memory.available_memory(opening.device)
    console.out.print(
        f"memory, estimated: {console.format_bytes(plan.total)} ({parts}); free now: {console.format_bytes(free)}"
    )
    if plan.total > free:
        console.out.print(
            "  more than is free: gradient checkpointing will be switched on where it is auto; smaller batches "
            "(training.tokens_per_batch), quantization or a smaller adapter.rank need less"
        )


def check_without_model(recipe: Recipe) -> None:
    """Read the recipe's local rows in their format, without tokenizer or model; what is not here is named."""
    given = [part for part in (recipe.data.train, recipe.data.eval) if isinstance(part, (str, list))]
    named = [spec for part in given for spec in ([SourceSpec(path=part)] if isinstance(part, str) else part)]
    here = [spec for spec in named if Path(spec.path).exists()]
    for spec in named:
        if spec not in here:
            console.out.print(f"{spec.path}: not on this machine, so its rows were not read")
    if here:
        local = recipe.data.model_copy(update={"train": here, "eval": None})
        for found in check_rows(local, recipe.task, console.info):
            bad = "".join(f", {count:,} skipped: {reason}" for reason, count in found.bad.items())
            console.out.print(f"{found.source}: {found.read:,} rows of format {found.format}{bad}")
    console.out.print("ok: the recipe is valid; model, labels and memory were not looked at")


def _shown(row: Row, opening: RunInputs, recipe: Recipe) -> Text:
    """A row as the model will learn it: of language models token by token, else its text and labels."""
    decode = opening.tokenizer.decode
    match recipe.task:
        case "causal-lm":
            return _coloured(row, opening)
        case "seq2seq-lm":
            target = decode([int(token) for token in row.labels], skip_special_tokens=False)
            return Text(f"{row.where}: {decode(row.input_ids, skip_special_tokens=False)} -> {target}")
        case "seq-cls":
            text = decode(row.input_ids, skip_special_tokens=False)
            return Text(f"{row.where}: {text} -> {_label(row, opening)}")
        case _:
            return _tagged(row, opening)


def _label(row: Row, opening: RunInputs) -> str:
    labels = opening.data.labels
    assert labels is not None
    if labels.kind == "regression":
        return ", ".join(f"{value:g}" for value in row.labels)
    if labels.kind == "multi":
        return ", ".join(name for name, on in zip(labels.names, row.labels, strict=True) if on) or "(none)"
    return labels.names[int(row.labels[0])]


def _tagged(row: Row, opening: RunInputs) -> Text:
    labels = opening.data.labels
    assert labels is not None
    text = Text(f"{row.where}:")
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        word = opening.tokenizer.decode([token], skip_special_tokens=False).strip()
        text.append(f" {word}" if label == IGNORE_INDEX else f" {word}[{labels.names[label]}]")
    return text


def _coloured(row: Row, opening: RunInputs) -> Text:
    """The row's text, supervised tokens in bold green, or between [[ and ]] where there is no colour."""
    text = Text(f"{row.where}: ")
    colour, inside = console.out.is_terminal, False
    for token, supervised in show_mask(row, opening.tokenizer):
        if not colour and supervised != inside:
            text.append("[[" if supervised else "]]")
        inside = supervised
        text.append(token, style="bold green" if supervised else "dim")
    if inside and not colour:
        text.append("]]")
    return text
