"""`lora init --interactive`: ask for model, rows and machine, and write a commented recipe that fits them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_cli.errors import LoraError
from lora_cli.recipe.dump import dump_values
from lora_cli.recipe.load import load_recipe, parse_recipe
from lora_cli.recipe.rules import DATA_SUFFIXES
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import atomic, console
from lora_cli.run.byte_size import parse_size
from lora_cli.run.questions import ReadLine, ask, tell
from lora_cli.run.shell import shell_path
from lora_cli.setup.first_inputs import FoundModel, FoundRows, count_held_out, find_first_model, find_first_rows
from lora_cli.setup.first_recipe import Choice, Choices, Inputs, Machine, Sample, choose, in_order, measure, to_tree
from lora_cli.setup.planned_gpus import planned_gpus
from lora_cli.setup.recipe_text import format_value, render_recipe

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_GPUS = 1024
HELD_OUT_ROWS = 500  # enough to compare losses
MAX_NAME = 100
NAME = re.compile(rf"[\w][\w.-]{{0,{MAX_NAME - 1}}}")
NOT_MEASURED = Choice(None, "asked for later")


def write_first_recipe(*, read: ReadLine | None = None) -> Path:
    """Ask the questions, write the recipe into the working folder, and print its path and the reasons.

    Args:
        read: reads an answer; None: from the terminal.

    Raises:
        LoraError: the input ends, or no form of the run fits the machine. Nothing is written.
    """
    if not os.access(os.curdir, os.W_OK | os.X_OK):
        raise LoraError("the working folder cannot be written", hint="change to the folder that the recipe is for")
    console.info("An empty answer takes the value in brackets. Ctrl-D or Ctrl-C ends without writing anything.")
    model = ask("base model (hub id, folder or .gguf file)", _parse_model, default=MODEL, read=read)
    if model.config is None:
        console.info(f"  note: {model.why_unknown}")
        console.info("  its memory is estimated by the size in its name, if it has one")
    rows = ask("training rows (file, folder, URL or hub dataset)", lambda text: _parse_rows(text, model), read=read)
    task = _ask_task(model, rows, read)
    inputs, sample = ask(
        "evaluation rows (a share of the training rows, a file, or none)",
        lambda text: _parse_held_out(text, model, rows, task),
        default=_default_share(rows.rows),
        read=read,
    )
    machine, choices = _ask_machine(inputs, sample, read)
    name = ask(
        "name of the recipe and its run",
        lambda text: _parse_name(text, inputs),
        default=_default_name(model, rows),
        read=read,
    )
    choices["output"] = Choice(f"runs/{name}", "run folder: recipe, metrics, checkpoints and adapter")
    choices = in_order(choices)
    path = Path(f"{name}.yaml")
    _write(path, _title(model, rows, task, machine), choices)
    console.out.print(str(path))
    for key, choice in choices.items():
        if key in REASONED:
            console.info(f"  {key}: {format_value(choice.value)} ({choice.why})")
    console.info(f"next: lora check {shell_path(path)}; lora train {shell_path(path)}")
    return path


# What depends on the answers; the other values are the usual ones, with their reasons in the file.
REASONED = (
    *(
        "task",
        "model.dtype",
        "data.format",
        "data.columns",
        "data.on_bad_row",
        "data.max_length",
        "data.overlong",
        "data.packing",
    ),
    *("quantization.bits", "training.epochs", "training.tokens_per_batch", "training.tokens_per_step"),
    *("training.batch_size", "training.learning_rate"),
)


def _write(path: Path, title: str, choices: Choices) -> None:
    text = render_recipe(title, {key: (choice.value, choice.why) for key, choice in choices.items()})
    try:
        with atomic.file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            load_recipe(temporary)  # what is written is valid
    except FileExistsError:
        raise LoraError(f"{path} exists", hint="move it away, or give another name") from None


def _title(model: FoundModel, rows: FoundRows, task: TaskName, machine: Machine) -> str:
    place = f"planned for {machine.gpus.describe()}" if machine.gpus else "planned for the CPU"
    return f"{task} adapter of {model.path} on {rows.path}, {place}: written by `lora init --interactive`."


def _check_values(values: Mapping[str, Any]) -> None:
    """Check values by their keys with dots as those of a recipe.

    Raises:
        LoraError: a recipe cannot have one of them.
    """
    needed = {"model.path": MODEL, "data.train": "rows.jsonl", **values}
    try:
        parse_recipe(dump_values(to_tree({key: Choice(value, "") for key, value in needed.items()})), Path("recipe"))
    except LoraError as error:
        problem, dash, fix = re.sub(r"^recipe:\d+: ", "", error.details[0]).partition(" — ")
        raise LoraError(problem, hint=fix if dash else None) from None


def _expand(text: str) -> str:
    """Return a path as a recipe has it, without `~`."""
    return os.path.expanduser(text) if text.startswith("~") else text


def _parse_model(text: str) -> FoundModel:
    text = _expand(text)
    _check_values({"model.path": text})
    return find_first_model(text, info=lambda line: console.info(f"  {line}"))


def _parse_rows(text: str, model: FoundModel) -> FoundRows:
    text = _expand(text)
    _check_values({"model.path": model.path, "data.train": text})
    rows = find_first_rows(text, model, info=lambda line: console.info(f"  {line}"))
    measure(Inputs(model, rows, next(iter(rows.formats)), NOT_MEASURED), info=console.no_output)
    count = f"{rows.rows:,} rows{'' if rows.complete else ' and more'}"
    formats = ", ".join(f"{format_} for {task}" for task, format_ in rows.formats.items())
    console.info(f"  {count}; format {formats}")
    for reason, number in rows.bad.items():
        console.info(f"  {number:,} cannot be used: {reason}")
    return rows


def _ask_task(model: FoundModel, rows: FoundRows, read: ReadLine | None) -> TaskName:
    """Ask for the task where the rows fit several."""
    first, *others = rows.formats
    if not others:
        return first

    def parse(text: str) -> TaskName:
        found: TaskName | None = next((task for task in rows.formats if task == text), None)
        if found is None:
            raise LoraError(f"these rows do not fit {text}", hint=f"write {' or '.join(rows.formats)}")
        if found != first:
            measure(Inputs(model, rows, found, NOT_MEASURED), info=console.no_output)
        return found

    return ask(f"task ({', '.join(rows.formats)})", parse, default=first, read=read)


def _ask_machine(inputs: Inputs, sample: Sample | None, read: ReadLine | None) -> tuple[Machine, Choices]:
    """Ask for the machine until a form of the run fits it; return it and what is chosen for it."""
    while True:
        machine = _ask_gpus(read)
        try:
            return machine, choose(inputs, machine, sample, info=lambda line: console.info(f"  {line}"))
        except LoraError as error:
            tell(error)


def _ask_gpus(read: ReadLine | None) -> Machine:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = ask("GPUs (0: the CPU of this machine)", _parse_gpus, default=str(present), read=read)
    if not gpus:
        return Machine(None)
    found = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f}GB" if present else "24GB"

    def parse(text: str) -> Machine:
        size = parse_size(text if re.search(r"[A-Za-z]", text) else f"{text}GB", option="memory", example="24GB")
        return Machine(planned_gpus(gpus, size))

    return ask("memory of each GPU", parse, default=found, read=read)


def _parse_gpus(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_GPUS:
        raise LoraError(f"{text} is not a number of GPUs", hint=f"write 0 to {MAX_GPUS}")
    return int(text)


def _default_share(rows: int) -> str:
    """Return the share of the rows that is held out: enough to measure a loss, and no more than that."""
    if rows < 20:
        return "none"
    return f"{min(0.1 if rows < 1_000 else 0.05, HELD_OUT_ROWS / rows):.2g}"


def _parse_held_out(text: str, model: FoundModel, rows: FoundRows, task: TaskName) -> tuple[Inputs, Sample | None]:
    """Return the inputs with the evaluation rows, and what was measured of them."""
    inputs = Inputs(model, rows, task, _held_out(_expand(text), rows, task))
    value = inputs.held_out.value
    _check_values({"model.path": model.path, "data.train": rows.path, "data.eval": value})
    return inputs, measure(inputs, info=lambda line: console.info(f"  {line}"))


def _held_out(text: str, rows: FoundRows, task: TaskName) -> Choice:
    if text.lower() in ("none", "no", "null"):
        return Choice(None, "no evaluation: too few rows, or none wanted")
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        count, complete = count_held_out(text, rows, task)
        return Choice(text, f"{count:,} rows{'' if complete else ' and more'} of their own")
    if not 0 < share < 1:
        raise LoraError(f"{text} is not a share of the rows", hint="write 0.05, 5%, a file, or none")
    return Choice(share, "share of the rows held out, by content: identical rows are in the same split")


def _default_name(model: FoundModel, rows: FoundRows) -> str:
    def short(path: str) -> str:
        name = Path(path).name
        for suffix in (".gguf", *DATA_SUFFIXES):
            name = name.removesuffix(suffix)
        return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower()

    name = f"{short(model.path)}-{short(rows.path)}"
    number = 1
    unique = name
    while Path(f"{unique}.yaml").exists() or Path("runs", unique).exists():
        number += 1
        unique = f"{name}-{number}"
    return unique


def _parse_name(text: str, inputs: Inputs) -> str:
    name = text.removesuffix(".yaml")
    if not NAME.fullmatch(name):
        raise LoraError(f"{text} is not a name", hint=f"write up to {MAX_NAME} letters, digits, - and _")
    paths = {"model.path": inputs.model.path, "data.train": inputs.rows.path, "data.eval": inputs.held_out.value}
    _check_values({**paths, "output": f"runs/{name}"})
    for path in (Path(f"{name}.yaml"), Path("runs", name)):
        if path.exists():
            raise LoraError(f"{path} exists", hint="give another name")
    return name
