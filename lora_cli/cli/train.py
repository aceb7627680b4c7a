"""`lora check`, `train` and `eval`."""

import json as json_library
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import completion
from lora_cli.cli.app import app, without_json
from lora_cli.cli.options import (
    Json,
    OtherBase,
    Overrides,
    RecipePath,
    check_json_file,
    more_adapters_option,
    target_argument,
    write_record,
)
from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.byte_size import parse_size
from lora_cli.run.output_path import check_output_file
from lora_cli.setup.adapter_folders import check_measurable


@app.command(examples=["lora check recipe.yaml", "lora check recipe.yaml --gpus 8 --budget 80GB"])
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Check only the recipe and the row format.")] = False,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Rows to print token by token.")] = 2,
    gpus: Annotated[
        int | None,
        # The largest clusters have about as many; each process of the plan has its share of the batches.
        typer.Option(min=1, max=100_000, metavar="N", help="Plan the memory for N GPUs, which need not be here."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each GPU, such as 80GB; default: this machine's.")
    ] = None,
    json: Json = None,
) -> None:
    """Validate a recipe: rows, label mask, target modules and memory, without loading weights."""
    from lora_cli.recipe.load import load_recipe
    from lora_cli.setup.missing_files import check_inputs_exist

    check_json_file(json)
    size = None if budget is None else parse_size(budget, option="--budget", example="80GB")
    if no_model and (gpus is not None or size is not None):
        raise LoraError("--gpus and --budget plan the model's memory", hint="leave out --no-model")
    loaded = load_recipe(recipe, overrides or [])
    if no_model:
        from lora_cli.commands.check_without_model import check_without_model

        write_record(json, check_without_model(loaded))
        return
    check_inputs_exist(loaded)
    with console.loading_libraries():
        from lora_cli.commands import check as command

    write_record(json, command.check(loaded, rows=rows, gpus=gpus, budget=size))


@app.command(examples=["lora train recipe.yaml", "lora train recipe.yaml --resume --set training.epochs=3"])
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Run folder, instead of the recipe's.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes on this machine.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move the existing run aside and start again.")] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Resume the run up to N times after a process has died.")
    ] = 0,
    json: Json = None,
) -> None:
    """Train an adapter, and verify the written files."""
    from lora_cli.recipe.load import load_recipe
    from lora_cli.setup.missing_files import check_training_can_start

    check_json_file(json)
    settings = [*(overrides or [])]
    settings += [f"output={json_library.dumps(output)}"] if output else []
    settings += [f"distributed.processes={processes}"] if processes else []
    loaded = load_recipe(recipe, settings)
    check_training_can_start(loaded, resume=resume, fresh=fresh)
    with console.loading_libraries():
        from lora_cli.commands.train import train as command
        from lora_cli.setup.run_summary import summarize_run

    arguments = without_json(sys.argv[1:])  # of the workers: this process alone writes the document
    code = command(loaded, resume=resume, fresh=fresh, arguments=arguments, max_restarts=max_restarts)
    if json is not None:
        write_record(json, summarize_run(Path(loaded.output), exit_code=code))
    raise typer.Exit(code)


@app.command("eval", examples=["lora eval runs/quickstart --answers 3", "lora eval runs/a --data test.jsonl --json"])
def evaluate(
    target: Annotated[str, target_argument("RECIPE|RUN|ADAPTER", "What to measure.")],
    adapters: Annotated[list[str] | None, more_adapters_option("Another adapter, or a merged model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to measure on, instead of data.eval.")] = None,
    json: Json = None,
    answers: Annotated[int, typer.Option(min=0, metavar="N", help="Number of prompts that each model answers.")] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Metric of the answers: exact_match, f1, rouge, bleu, chrf, json_valid or numeric_match.",
            autocompletion=completion.text_metrics,
        ),
    ] = None,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every answer to this file.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of the lm-evaluation-harness.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with YAML files of more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Documents per task; default: all.")] = None,
    other_base: OtherBase = False,
) -> None:
    """Measure base, adapters and merged models side by side on held-out rows."""
    check_json_file(json)
    check_output_file("--predictions", predictions)
    check_measurable(Path(target))
    if Path(target).is_file():
        from lora_cli.recipe.load import load_recipe
        from lora_cli.setup.missing_files import check_inputs_exist

        check_inputs_exist(load_recipe(Path(target)), data=data)
    elif data is not None:
        from lora_cli.data.file_sources import check_local_path

        check_local_path(data)
    with console.loading_libraries():
        from lora_cli.commands.evaluate import evaluate as command
        from lora_cli.evaluation.answers import GenerationOptions

    options = GenerationOptions(answers, metric or [], predictions, tasks or [], tasks_dir, limit)
    record = command(target, adapters=adapters or [], data=data, options=options, other_base=other_base)
    write_record(json, record)
