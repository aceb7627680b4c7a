"""Rules of the training section: steps, batches, learning rate schedule, optimizer, evaluations. No torch."""

from collections.abc import Iterator

from lora_cli.recipe.problem import Conflict
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.training_section import TrainingSpec

# Methods that train no product of matrices, which muon is for.
WITHOUT_MATRICES = ("vera", "ia3", "oft", "boft", "prefix", "prompt", "p-tuning")
WITHOUT_BETAS = {"lion": (0.9, 0.99), "adafactor": None}  # optimizers with betas of their own, by their first word


def check_steps(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the number of steps and the warmup."""
    training = recipe.training
    if training.epochs is not None and training.max_steps is not None:
        message = "epochs and max_steps are both set"
        yield Conflict("training.max_steps", message, "keep one", ("training.epochs",))
    if training.warmup >= 1 and not training.warmup.is_integer():
        message = f"{training.warmup:g} is neither a fraction below 1 nor a whole number of steps"
        yield Conflict("training.warmup", message, f"write {training.warmup:.0f} for steps")
    elif training.warmup >= 1 and training.max_steps and training.warmup > training.max_steps:
        message = f"{training.warmup:g} warmup steps are more than max_steps, {training.max_steps}"
        fix = "write fewer, or a fraction such as 0.03"
        yield Conflict("training.warmup", message, fix, ("training.max_steps",))


def check_batches(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the size of batches."""
    training, data = recipe.training, recipe.data
    if data.packing is False and training.tokens_per_batch is not None:
        fix = "write batch_size, or packing: true"
        yield Conflict("training.tokens_per_batch", "has no effect without packing", fix, ("data.packing",))
    if data.packing is not False and training.batch_size is not None:
        fix = "write tokens_per_batch, or `data: {packing: false}`"
        yield Conflict("training.batch_size", "has no effect with packing", fix, ("data.packing",))
    tokens = training.tokens_per_batch
    alone = training.gradient_accumulation == 1 and training.tokens_per_step is None
    if data.packing is not False and tokens == "auto" and alone:
        fix = "write training.tokens_per_step, or raise training.gradient_accumulation; or remove this key"
        yield Conflict("training.tokens_per_batch", "auto has no batches to join", fix)
    elif data.packing and isinstance(tokens, int) and tokens < data.max_length:
        message = f"{tokens} is less than data.max_length, {data.max_length}"
        fix = "raise it, or lower data.max_length: a batch must have room for the longest row"
        yield Conflict("training.tokens_per_batch", message, fix, ("data.packing", "data.max_length"))


def check_step_size(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the tokens or rows of a step."""
    training, packing = recipe.training, recipe.data.packing
    for key, value, other, fits in (
        ("training.tokens_per_step", training.tokens_per_step, "rows_per_step", packing is not False),
        ("training.rows_per_step", training.rows_per_step, "tokens_per_step", packing is False),
    ):
        if value is None:
            continue
        if not fits:
            fix = f"write {other}, or `data: {{packing: {'true' if packing is False else 'false'}}}`"
            message = f"has no effect with{'out' * (packing is False)} packing"
            yield Conflict(key, message, fix, ("data.packing",))
        elif training.gradient_accumulation != 1:
            message = "gradient_accumulation and this key both say how large a step is"
            yield Conflict(key, message, "keep one", ("training.gradient_accumulation",))
        else:
            yield from _check_multiple(recipe, key, value)


def _check_multiple(recipe: Recipe, key: str, value: int) -> Iterator[Conflict]:
    training, packing = recipe.training, recipe.data.packing is not False
    name = "training.tokens_per_batch" if packing else "training.batch_size"
    size = training.tokens_per_batch if packing else training.batch_size
    if packing and size == "auto":
        name, size = "data.max_length", recipe.data.max_length
        fits = value >= size
    else:
        fits = size is None or value % int(size) == 0
    if not fits:
        count = value // int(size or 1)
        choices = " or ".join(f"{int(size or 1) * number}" for number in (count, count + 1) if number)
        what = "less than" if training.tokens_per_batch == "auto" and packing else "no multiple of"
        yield Conflict(key, f"{value} is {what} {name}, {size}", f"write {choices}", (name,))


def check_schedule(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the learning rate schedule with its own keys and with the steps."""
    spec = recipe.training
    by = ("training.schedule",)
    if spec.min_learning_rate > spec.learning_rate:
        message = f"{spec.min_learning_rate:g} is above training.learning_rate, {spec.learning_rate:g}"
        fix = "write a lower one: it is absolute, not a fraction"
        yield Conflict("training.min_learning_rate", message, fix, ("training.learning_rate",))
    if spec.min_learning_rate and spec.schedule == "constant":
        fix = "remove it, or write another schedule"
        yield Conflict("training.min_learning_rate", "has no effect with a constant schedule", fix, by)
    if spec.cycles is not None and spec.schedule != "cosine-with-restarts":
        fix = "remove it, or write schedule: cosine-with-restarts"
        yield Conflict("training.cycles", f"has no effect with schedule {spec.schedule}", fix, by)
    if spec.decay is not None and spec.schedule != "wsd":
        fix = "remove it, or write schedule: wsd"
        yield Conflict("training.decay", f"has no effect with schedule {spec.schedule}", fix, by)
    elif spec.decay is not None:
        yield from _check_decay(spec, spec.decay)
    if spec.cycles and spec.max_steps and spec.cycles > spec.max_steps:
        message = f"{spec.cycles} cycles are more than max_steps, {spec.max_steps}"
        yield Conflict("training.cycles", message, "write fewer", ("training.max_steps",))
    if spec.optimizer == "schedule-free-adamw" and spec.schedule != "constant":
        message = "schedule-free-adamw averages the weights in place of a decay"
        yield Conflict("training.schedule", message, "remove it, or write constant", ("training.optimizer",))


def _check_decay(spec: TrainingSpec, decay: float) -> Iterator[Conflict]:
    if decay >= 1 and not decay.is_integer():
        message = f"{decay:g} is neither a fraction below 1 nor a whole number of steps"
        yield Conflict("training.decay", message, f"write {decay:.0f} for steps")
    elif decay < 1 and spec.warmup < 1 and decay + spec.warmup > 1:
        message = f"warmup and decay together, {spec.warmup:g} + {decay:g}, are more than all steps"
        yield Conflict("training.decay", message, "write a smaller fraction", ("training.warmup",))
    elif decay >= 1 and spec.max_steps:
        warmup = int(spec.warmup) if spec.warmup >= 1 else 0
        if warmup + decay > spec.max_steps:
            plus = f" and {warmup} of warmup" if warmup else ""
            message = f"{decay:g} steps of decay{plus} are more than max_steps, {spec.max_steps}"
            fix = "write fewer, or a fraction such as 0.1"
            yield Conflict("training.decay", message, fix, ("training.max_steps", "training.warmup"))


def check_optimizer(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the optimizer and its steps with its options and with the adapter method."""
    spec, method = recipe.training, recipe.adapter.method
    kind = spec.optimizer.removeprefix("paged-").partition("-")[0]
    depends_on = ("training.optimizer",)
    if kind in WITHOUT_BETAS:
        for key in ("adam_beta1", "adam_beta2"):
            # The default is not a conflict, because every resolved recipe contains it.
            if getattr(spec, key) != TrainingSpec.model_fields[key].default:
                own = WITHOUT_BETAS[kind]
                fix = f"remove it: {kind}'s betas are {own[0]} and {own[1]}" if own else "remove it"
                yield Conflict(f"training.{key}", f"has no effect with optimizer {spec.optimizer}", fix, depends_on)
    if spec.on_spike == "skip" and method == "adalora":
        message = "adalora ranks its components by the gradients of every step"
        yield Conflict("training.on_spike", message, "write warn, or another method", ("adapter.method",))
    if spec.optimizer == "muon" and method in WITHOUT_MATRICES:
        message = f"muon trains the matrices of LoRA, and {method} has none"
        yield Conflict("training.optimizer", message, "write adamw, or another method", ("adapter.method",))
    if spec.optimizer == "schedule-free-adamw":
        if method == "adalora":
            message = "schedule-free-adamw averages the weights, but adalora sets pruned ones to 0"
            yield Conflict("training.optimizer", message, "write adamw, or another method", ("adapter.method",))
        if spec.adam_beta1 == 0:
            message = "schedule-free-adamw needs it above 0: it is the weight of the average"
            yield Conflict("training.adam_beta1", message, "write 0.9", depends_on)


def check_evaluations(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of keep, stop_after and answer_every with the evaluation rows and the evaluations."""
    spec = recipe.training
    used = {
        "training.keep": spec.keep == "best" and "best",
        "training.stop_after": spec.stop_after and f"{spec.stop_after}",
        "training.answer_every": spec.answer_every and f"{spec.answer_every}",
    }
    for key, value in used.items():
        if not value:
            continue
        if recipe.data.eval is None:
            message = f"{value} needs evaluation rows, but data.eval is null"
            yield Conflict(key, message, "write data.eval: 0.05, or remove this key", ("data.eval",))
        elif spec.eval_every is None and key != "training.answer_every":
            message = f"{value} needs evaluations during training, but training.eval_every is null"
            yield Conflict(key, message, "write training.eval_every in steps", ("training.eval_every",))
    if spec.answer_every is None:
        if spec.answer_prompts != TrainingSpec.model_fields["answer_prompts"].default:
            fix = "write answer_every too, or remove it"
            yield Conflict("training.answer_prompts", "has no effect without answer_every", fix)
        return
    if recipe.task not in ("causal-lm", "seq2seq-lm"):
        message = f"a model for {recipe.task} does not generate text"
        yield Conflict("training.answer_every", message, "remove it", ("task",))
    elif recipe.task == "causal-lm" and recipe.data.loss_on == "all":
        message = "rows have no prompt with data.loss_on: all"
        yield Conflict("training.answer_every", message, "remove it, or write another loss_on", ("data.loss_on",))
