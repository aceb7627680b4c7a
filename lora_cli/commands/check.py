"""`lora check`: all that can be known of a run before weights are loaded."""

from pathlib import Path

from rich.text import Text

from lora_cli.commands import card
from lora_cli.commands.opening import Opening, batch_plan, coverage_table, open_run_inputs
from lora_cli.data.intake import read_only_check
from lora_cli.data.rows import Row, xray
from lora_cli.model import adapter, base, memory, targets
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.run import console


def check(recipe: Recipe, *, rows: int) -> None:
    """Print the ledger, `rows` rows token by token, the steps, the target modules and the memory plan."""
    say = console.out.print
    opening = open_run_inputs(recipe.model, recipe.data, seed=recipe.training.seed, say=console.say, weights=False)
    for line in opening.data.ledger.table():
        say(line)
    for number in range(min(rows, len(opening.data.train))):
        say(_coloured(opening.data.train[number], opening))
    if rows:
        say("(bold green carries loss)" if console.out.is_terminal else "([[ ]] carries loss)")
    plan = batch_plan(recipe, opening, opening.data.train, per_step=recipe.training.gradient_accumulation)
    total = plan.steps_in(epochs=recipe.training.epochs, max_steps=recipe.training.max_steps)
    say(
        f"steps: {total:,} in one process, {plan.steps_per_epoch:,} an epoch; "
        f"{plan.fill:.1%} of what the batches compute is tokens"
    )
    _count(recipe, opening, tokens=plan.largest)
    say(f"ok: lora train would train {card.public(recipe.model.path)} on these rows")


def _count(recipe: Recipe, opening: Opening, *, tokens: int) -> None:
    """Target modules and the memory plan, from the modules' shapes on the meta device."""
    model = base.skeleton(base.load_config(opening.source), trust_remote_code=recipe.model.trust_remote_code)
    layers = targets.linear_layers(model)
    adapted = adapter.attach(model, recipe.adapter, seed=recipe.training.seed)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for line in coverage_table(adapter.coverage(adapted, layers), trainable):
        console.out.print(line)
    plan = memory.plan(
        adapted.unload(),  # the base's modules as they were
        dtype=opening.dtype,
        trainable=trainable,
        tokens=tokens,
        longest=int(opening.data.train.lengths.max()),
        checkpointing=recipe.training.gradient_checkpointing is True,
        quantization=recipe.quantization,
        on_cpu=opening.device.type == "cpu",
    )
    parts = ", ".join(f"{name} {console.size(value)}" for name, value in plan._asdict().items() if value)
    free = memory.available(opening.device)
    console.out.print(f"memory, estimated: {console.size(plan.total)} ({parts}); free now: {console.size(free)}")
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
        for found in read_only_check(local, console.say):
            bad = "".join(f", {count:,} skipped: {reason}" for reason, count in found.bad.items())
            console.out.print(f"{found.source}: {found.read:,} rows of format {found.format}{bad}")
    console.out.print("ok: the recipe is valid; model, labels and memory were not looked at")


def _coloured(row: Row, opening: Opening) -> Text:
    """The row's text, supervised tokens in bold green, or between [[ and ]] where there is no colour."""
    text = Text(f"{row.where}: ")
    colour, inside = console.out.is_terminal, False
    for token, supervised in xray(row, opening.tokenizer):
        if not colour and supervised != inside:
            text.append("[[" if supervised else "]]")
        inside = supervised
        text.append(token, style="bold green" if supervised else "dim")
    if inside and not colour:
        text.append("]]")
    return text
