"""A first recipe for a model, rows and a machine: task and format from the rows, sizes from the memory plan.

Each value comes with its reason, which becomes the comment in the recipe. The plan is that of `lora check`, for the
first rows of the data. Where the model is not on this machine, its size is taken from its name, and that is said.
"""

import re
from typing import Any, NamedTuple

from lora_cli.data.formats import FORMATS
from lora_cli.errors import LoraError
from lora_cli.model import memory
from lora_cli.model.gpu_plan import CONTEXT_BYTES, plan_strategies
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.tasks import FormatName, TaskName
from lora_cli.run.console import format_bytes, no_output
from lora_cli.setup.first_inputs import CPU, MAX_BAD, FoundModel, FoundRows, Info
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs
from lora_cli.setup.planned_gpus import GPU, PlannedGpus, changes_that_help, on_planned_gpus
from lora_cli.setup.strategy import forms_of, sharding_obstacle
from lora_cli.setup.training_memory import memory_of_run
from lora_cli.setup.training_model import adapted_skeleton, check_before_rows, resolve_optimizer

SAMPLE_ROWS = 1_000  # rows that are tokenized for their lengths and the plan
LENGTH_STEP = 64  # max_length is a multiple of it
LONGEST = 32_768  # tokens, to which rows are measured
CHUNK = 2_048  # tokens of the parts of documents
MAX_STEP_TOKENS = 16_384  # of a step
ROWS_PER_STEP = 16  # without packing
MIN_STEPS = 100  # of a run, if it has enough rows
SMALL = 1_000_000_000  # parameters, below which the learning rate is higher
SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z])")
DROPPED = "longer rows are dropped and counted; a truncated answer would lack its end token"
PACKED = "several rows per sequence, without attention between them: no padding"
DTYPE = "bfloat16 where the device computes in it"
EPOCHS = "passes over the rows; more than three tend to overfit"

# Of the keys in each section, as in configs/.
ORDER = (
    *("path", "dtype", "task", "bits", "method", "rank", "alpha", "dropout", "target_modules"),
    *("train", "eval", "format", "columns", "on_bad_row", "max_length", "overlong", "packing"),
    *("epochs", "tokens_per_batch", "tokens_per_step", "batch_size", "rows_per_step", "learning_rate", "schedule"),
    *("warmup", "gradient_checkpointing", "eval_every", "save_every", "seed", "output"),
)


class Machine(NamedTuple):
    """What the run is planned for."""

    gpus: PlannedGpus | None  # None: the CPU of this machine


class Choice(NamedTuple):
    """A value of the recipe and the reason for it."""

    value: Any
    why: str


Choices = dict[str, Choice]  # by the key of the recipe, with dots
SMALL_RATE = Choice(5.0e-4, "small models need more than the usual 2e-4")


def choose(
    model: FoundModel, rows: FoundRows, task: TaskName, machine: Machine, *, held_out: Choice, output: str, info: Info
) -> Choices:
    """Choose every value of a recipe.

    Args:
        model: the base.
        rows: of training.
        task: one that model and rows have in common.
        machine: that the run is planned for.
        held_out: value of data.eval.
        output: run folder.
        info: prints what is being measured.

    Raises:
        LoraError: the model's files or the rows do not fit together, or no form of the run fits the machine.
    """
    choices: Choices = {
        "model.path": Choice(model.path, "hub id, folder or .gguf file"),
        "model.dtype": Choice("auto", DTYPE),
        "task": Choice(task, f"the rows have the format {rows.formats[task]}"),
        "data.train": Choice(rows.path, f"{rows.rows:,} rows{'' if rows.complete else ' and more'}"),
        "data.eval": held_out,
        "data.format": Choice(rows.formats[task], FORMATS[rows.formats[task]].summary.split(";")[0]),
        "output": Choice(output, "run folder: recipe, metrics, checkpoints and adapter"),
    }
    if rows.columns:
        choices["data.columns"] = Choice(rows.columns, "maps the columns of the format to those of the file")
    if rows.bad:
        count = sum(rows.bad.values())
        choices["data.on_bad_row"] = Choice("skip", f"{count:,} of {rows.rows:,} rows: {', '.join(rows.bad)}; counted")
    choices |= _usual(model, rows)
    if model.config is None:
        choices |= _by_name(model, rows, task, machine)
    else:
        choices |= _by_plan(choices, rows, task, machine, info=info)
    return {key: choices[key] for key in sorted(choices, key=lambda key: ORDER.index(key.rpartition(".")[2]))}


def to_tree(choices: Choices) -> dict[str, Any]:
    """Return the recipe as nested values."""
    tree: dict[str, Any] = {}
    for key, choice in choices.items():
        section, dot, name = key.rpartition(".")
        target = tree.setdefault(section, {}) if dot else tree
        target[name] = choice.value
    return tree


def _by_name(model: FoundModel, rows: FoundRows, task: TaskName, machine: Machine) -> Choices:
    """Choose by the number of parameters in the model's name: neither its config nor its tokenizer is here."""
    parameters = parameters_in_name(model.path)
    choices: Choices = {
        "data.max_length": Choice(1024, "tokens; the lengths of the rows are not known without the tokenizer"),
        "data.overlong": Choice("drop", DROPPED),
        "training.epochs": Choice(_epochs(rows.rows), EPOCHS),
        **_intervals(500),
    }
    if task == "causal-lm":
        choices["data.packing"] = Choice(True, PACKED)
        choices["training.tokens_per_batch"] = Choice("auto", "as many tokens at a time as the memory allows")
        choices["training.tokens_per_step"] = Choice(MAX_STEP_TOKENS, "over all GPUs")
    if parameters is None or machine.gpus is None:
        return choices
    weights, budget = 2 * parameters, machine.gpus.memory - CONTEXT_BYTES
    if weights > 0.7 * budget:
        text = f"16-bit weights of {model.path} take about {format_bytes(weights)} of {format_bytes(budget)}"
        choices["quantization.bits"] = Choice(4, f"{text}, by its name")
    return choices


def parameters_in_name(name: str) -> int | None:
    """Return the number of parameters that the name of a model states: 8B, 135M; None if it does not."""
    found = [float(number) * (1e9 if unit in "Bb" else 1e6) for number, unit in SIZE_IN_NAME.findall(name)]
    return int(max(found)) if found else None


class _Sample(NamedTuple):
    """The first rows, tokenized."""

    lengths: Any  # int [rows], in tokens
    complete: bool  # whether these are all rows
    limit: int  # tokens, to which longer rows were cut
    packing: bool  # whether the model allows it

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def tokens(self) -> int:
        """The smallest max_length for all rows: a multiple of LENGTH_STEP, but not above the limit."""
        return min(self.limit, -(-self.longest // LENGTH_STEP) * LENGTH_STEP)


def _by_plan(choices: Choices, rows: FoundRows, task: TaskName, machine: Machine, *, info: Info) -> Choices:
    """Choose length, quantization and batches by the memory plan for the first rows.

    Raises:
        LoraError: model and rows do not fit together, or no form of the run fits the machine.
    """
    info(f"tokenizing the first {min(rows.rows, SAMPLE_ROWS):,} rows")
    sample = _tokenize(choices, rows)
    info(f"their longest row has {sample.longest:,} tokens, the mean is {sample.lengths.mean():,.0f}")
    chosen = _length(sample, rows.formats[task])
    chosen |= _steps(sample, rows, machine, chosen["data.max_length"].value)
    if task == "causal-lm":
        chosen["data.packing"] = Choice(sample.packing, PACKED if sample.packing else "the model would mix packed rows")
    fit = _plan({**choices, **chosen}, machine)
    if not fit.fits and fit.inputs.prequantized is None:
        chosen["quantization.bits"] = Choice(4, f"with 16-bit weights, {fit.text}, which does not fit")
        fit = _plan({**choices, **chosen}, machine)
    if not fit.fits and 2 * LENGTH_STEP <= fit.largest < chosen["data.max_length"].value:
        limit = fit.largest // LENGTH_STEP * LENGTH_STEP
        lost, count = int((sample.lengths > limit).sum()), len(sample.lengths)
        if lost <= MAX_BAD * count:
            why = f"tokens; longer rows do not fit into memory: {lost:,} of the first {count:,}"
            chosen |= {"data.max_length": Choice(limit, why), "data.overlong": Choice("drop", DROPPED)}
            chosen |= _steps(sample, rows, machine, limit)
            fit = _plan({**choices, **chosen}, machine)
    if not fit.fits:
        raise LoraError(
            f"no form of this run fits: {fit.text}",
            hint="give a smaller model, or a machine with more memory",
            details=fit.advice,
        )
    info(f"planned: {fit.text}")
    key = "training.tokens_per_batch" if sample.packing else "training.batch_size"
    chosen[key] = chosen[key]._replace(why=f"{chosen[key].why}; planned: {fit.text}")
    if "quantization.bits" not in chosen:
        quantized = fit.inputs.prequantized is not None
        why = "the model is quantized already" if quantized else "not quantized: the 16-bit weights fit"
        chosen["model.dtype"] = Choice("auto", f"{DTYPE}; {why}")
    if sum(parameter.numel() for parameter in fit.inputs.base.skeleton().parameters()) < SMALL:
        chosen["training.learning_rate"] = SMALL_RATE
    return chosen


def _recipe(choices: Choices) -> Recipe:
    """Return the recipe of `choices` with the first rows only, none of them held out."""
    tree = to_tree(choices)
    tree["data"] |= {"train": [{"path": tree["data"]["train"], "max_rows": SAMPLE_ROWS}], "eval": None}
    return Recipe.model_validate(tree)


def _tokenize(choices: Choices, rows: FoundRows) -> _Sample:
    limit = LONGEST
    while True:
        measured = {"data.max_length": Choice(limit, ""), "data.overlong": Choice("truncate", "")}
        try:
            inputs = load_inputs(_recipe({**choices, **measured}), info=no_output, weights=False)
        except LoraError as error:
            positions = re.search(r"the model has positions for ([\d,]+)", error.message)
            if positions is None or int(positions[1].replace(",", "")) >= limit:
                raise
            limit = int(positions[1].replace(",", ""))
            continue
        complete = rows.complete and rows.rows <= SAMPLE_ROWS
        return _Sample(inputs.data.train.lengths, complete, limit, bool(inputs.recipe.data.packing))


def _length(sample: _Sample, format_: FormatName) -> Choices:
    """Choose max_length: no less than the longest row, except for documents, which are split.

    Raises:
        LoraError: too many rows are longer than the model's positions.
    """
    cut = sample.longest >= sample.limit
    if format_ == "text" and sample.longest > min(CHUNK, sample.limit - 1):
        why = f"tokens; the longest document has {sample.longest:,}{' or more' if cut else ''}"
        split = Choice("split", "documents are split into rows in which every token carries loss once")
        return {"data.max_length": Choice(min(CHUNK, sample.limit), why), "data.overlong": split}
    too_long, count = int((sample.lengths >= sample.limit).sum()), len(sample.lengths)
    if too_long > MAX_BAD * count:
        raise LoraError(
            f"{too_long:,} of {count:,} rows have {sample.limit:,} tokens or more",
            hint="give shorter rows, or a model with more positions",
        )
    size = sample.tokens
    of = "the longest row" if sample.complete else f"the longest of the first {len(sample.lengths):,} rows"
    exact = sample.complete and not cut
    return {
        "data.max_length": Choice(size, f"tokens; {of} has {sample.longest:,}{' or more' if cut else ''}"),
        "data.overlong": Choice("error", "a longer row is an error") if exact else Choice("drop", DROPPED),
    }


def _steps(sample: _Sample, rows: FoundRows, machine: Machine, longest: int) -> Choices:
    """Choose the size of a step such that the run has enough steps, and its batches, of rows up to `longest` tokens."""
    gpus = machine.gpus.number if machine.gpus else 1
    epochs = _epochs(rows.rows)
    chosen: Choices = {"training.epochs": Choice(epochs, EPOCHS)}
    if not sample.packing:
        per_step = ROWS_PER_STEP * -(-gpus // ROWS_PER_STEP)
        chosen |= _intervals(rows.rows * epochs // per_step)
        chosen["training.batch_size"] = Choice(4 if gpus <= 4 else 1, "rows per device and pass")
        chosen["training.rows_per_step"] = Choice(per_step, "over all GPUs")
        return chosen
    tokens = float(sample.lengths.mean()) * rows.rows * epochs
    share = int(tokens / MIN_STEPS)
    size = min(MAX_STEP_TOKENS, 1 << max(0, share.bit_length() - 1))
    size = max(size, gpus * longest)
    steps = max(1, round(tokens / size))
    chosen |= _intervals(steps)
    chosen["training.tokens_per_batch"] = Choice("auto", "as many tokens at a time as the memory allows")
    chosen["training.tokens_per_step"] = Choice(size, f"over all GPUs; about {steps:,} steps of these rows")
    return chosen


def _intervals(steps: int) -> Choices:
    """Choose the steps between evaluations and checkpoints: several in a run."""
    every = max(1, min(100, steps // 5))
    every -= every % 5 if every > 5 else 0
    return {
        "training.eval_every": Choice(every, "steps"),
        "training.save_every": Choice(every, "steps; --resume continues from the last checkpoint"),
    }


def _epochs(rows: int) -> int:
    return 1 if rows >= 10_000 else 2 if rows >= 2_000 else 3


class _Fit(NamedTuple):
    """A recipe that was planned."""

    inputs: RunInputs
    fits: bool
    text: str  # what a step takes, of what there is
    largest: int  # most tokens that fit at a time
    advice: list[str]  # what would need less


def _plan(choices: Choices, machine: Machine) -> _Fit:
    """Plan the memory of a recipe on a machine, as `lora check` does."""
    recipe, gpus = _recipe(choices), machine.gpus
    check_before_rows(recipe, device=GPU if gpus else None)
    inputs = load_inputs(recipe, info=no_output, weights=False)
    inputs = on_planned_gpus(recipe, inputs) if gpus else inputs._replace(device=CPU)
    recipe = inputs.recipe
    optimizer = resolve_optimizer(recipe, inputs)
    batches = batch_plan(recipe, inputs, inputs.data.train, processes=gpus.number if gpus else 1)
    adapted = adapted_skeleton(recipe, inputs)
    needed = memory_of_run(recipe, inputs, adapted, optimizer=optimizer)
    if gpus is None:
        free, tokens = memory.available_memory(CPU), int(inputs.data.train.lengths.max())
        plan = needed.plan(tokens, every=1)
        text = f"at least {format_bytes(plan.total)} of the {format_bytes(free)} of memory that are free"
        rest = free - plan.total + plan.activations
        largest = max(0, int(tokens * rest / max(1, plan.activations)))
        return _Fit(inputs, plan.total <= free, text, min(largest, tokens), [])
    plans = plan_strategies(needed, forms_of(recipe, adapted, batches), gpus=gpus.number, budget=gpus.memory)
    best = next((plan.best for plan in plans if plan.best is not None), None)
    shown = best or min((form for plan in plans for form in plan.forms), key=lambda form: form.total)
    text = f"{format_bytes(shown.total)} of {format_bytes(gpus.memory)} ({shown.form.name})"
    shardable = not sharding_obstacle(recipe, inputs)
    advice = [] if best else list(changes_that_help(recipe, inputs, needed, plans, gpus, shardable=shardable))
    return _Fit(inputs, best is not None, text, max(plan.largest for plan in plans), advice)


def _usual(model: FoundModel, rows: FoundRows) -> Choices:
    """Choose adapter and learning rate by the size of the model, and the rest by usual values."""
    parameters = parameters_in_name(model.path)
    small = parameters is not None and parameters < SMALL
    few = rows.rows < 10_000
    return {
        "adapter.method": Choice("lora", "W + alpha/rank·BA; `lora methods` lists the others"),
        "adapter.rank": Choice(16, "capacity of the update; the adapter file grows with it"),
        "adapter.alpha": Choice(32, "the update is scaled by alpha/rank = 2"),
        "adapter.dropout": Choice(0.05 if few else 0.0, "against overfitting on few rows" if few else "off: many rows"),
        "adapter.target_modules": Choice("all-linear", "every linear layer except the output head"),
        "training.learning_rate": SMALL_RATE if small else Choice(2.0e-4, "usual for LoRA"),
        "training.schedule": Choice("cosine", "decays to 0 at the last step"),
        "training.warmup": Choice(0.03, "share of the steps in which the learning rate rises from 0"),
        "training.gradient_checkpointing": Choice("auto", "recompute activations where memory requires it"),
        "training.seed": Choice(42, "seed of adapter, dropout, row order and held-out rows"),
    }
