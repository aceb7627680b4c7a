"""The command line (typer app): parse arguments, call a function of commands/, print errors in two lines. No torch."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.byte_size import parse_size
from lora_cli.run.library_warnings import silence_library_warnings
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.output_path import check_output_file, check_output_path, reserve_output_path
from lora_cli.run.print_error import print_error
from lora_cli.run.signals import handle_signals, stop_with_launcher
from lora_cli.run.streams import standard_streams
from lora_cli.run.system_errors import as_os_error
from lora_cli.setup.adapter_folders import (
    check_measurable,
    find_adapter,
    find_chat_adapters,
    parse_weighted_adapters,
)
from lora_cli.setup.export_paths import check_export_paths, find_exported_adapter

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file; `lora init` lists examples.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key: --set training.learning_rate=1e-4."),
]
BasePath = Annotated[
    str | None, typer.Option("--base", metavar="PATH", help="Another base than the one that the adapter names.")
]
OtherBase = Annotated[bool, typer.Option("--other-base", help="Allow a base with other weights than in training.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code of the base's repository.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace --out if it is a result of lora.")]


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Check only the recipe and the row format.")] = False,
    rows: Annotated[int, typer.Option(min=0, help="Rows to print token by token.")] = 2,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Plan the memory for N GPUs, which need not be here.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each GPU, such as 80GB; default: this machine's.")
    ] = None,
) -> None:
    """Validate a recipe: rows, label mask, target modules and memory, without loading weights."""
    from lora_cli.recipe.load import load_recipe

    size = None if budget is None else parse_size(budget, option="--budget", example="80GB")
    if no_model and (gpus is not None or size is not None):
        raise LoraError("--gpus and --budget plan the model's memory", hint="leave out --no-model")
    loaded = load_recipe(recipe, overrides or [])
    with console.loading_libraries():
        from lora_cli.commands import check as command

    if no_model:
        command.check_without_model(loaded)
    else:
        command.check(loaded, rows=rows, gpus=gpus, budget=size)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Run folder, instead of the recipe's.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move the existing run aside and start again.")] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Resume the run up to N times after a process has died.")
    ] = 0,
) -> None:
    """Train an adapter, and verify the written files."""
    from lora_cli.recipe.load import load_recipe

    settings = [*(overrides or [])]
    settings += [f"output={json.dumps(output)}"] if output else []
    settings += [f"distributed.processes={processes}"] if processes else []
    loaded = load_recipe(recipe, settings)
    with console.loading_libraries():
        from lora_cli.commands.train import train as command

    arguments = sys.argv[1:]
    raise typer.Exit(command(loaded, resume=resume, fresh=fresh, arguments=arguments, max_restarts=max_restarts))


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN|ADAPTER", help="What to measure.", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="[NAME=]DIR", help="Another adapter, or a merged model.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to measure on, instead of data.eval.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="Number of prompts that each model answers.")] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric of the answers: exact_match, f1, rouge, bleu, chrf, json_valid or numeric_match."),
    ] = None,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every answer to this file.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of the lm-evaluation-harness.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with YAML files of more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; default: all.")] = None,
    other_base: OtherBase = False,
) -> None:
    """Measure base, adapters and merged models side by side on held-out rows."""
    check_output_file("--json", json_file)
    check_output_file("--predictions", predictions)
    check_measurable(Path(target))
    if Path(target).is_file():
        from lora_cli.recipe.load import load_recipe

        load_recipe(Path(target))  # a bad recipe is reported before the seconds that importing torch takes
    with console.loading_libraries():
        from lora_cli.commands.evaluate import evaluate as command
        from lora_cli.evaluation.answers import GenerationOptions

    options = GenerationOptions(answers, metric or [], predictions, tasks or [], tasks_dir, limit)
    command(target, adapters=adapters or [], data=data, json_file=json_file, options=options, other_base=other_base)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the merged model.", show_default=False)],
    base: BasePath = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="For a base that was quantized in training: auto (measured), original or dequantized.")
    ] = "auto",
    verify: Annotated[str, typer.Option(help="logits (and every tensor), or tensors alone.")] = "logits",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of a file.")] = "2GB",
    force: Force = False,
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Subtract the adapter from --base MERGED again.")] = False,
    other_base: OtherBase = False,
    trust: TrustRemoteCode = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor, and verify the result."""
    _choice("--dtype", dtype, "auto", "bfloat16", "float16", "float32")
    _choice("--weights", weights, "auto", "original", "dequantized")
    _choice("--verify", verify, "logits", "tensors")
    with reserve_output_path(out):
        check_output_path(out, inputs=[find_adapter(adapter)], replace=force, command="merge")
        with console.loading_libraries():
            from lora_cli.commands import merge as command

        request = command.MergeRequest(
            base=base,
            dtype=dtype,
            weights=weights,
            verify=verify,
            max_shard_size=max_shard_size,
            force=force,
            unmerge=unmerge,
            other_base=other_base,
            trust_remote_code=trust,
        )
        command.merge(adapter, out=out, request=request)


@app.command()
def export(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL|RUN|ADAPTER", help="What to export.", show_default=False)
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="`--to list` prints all formats.")] = "list",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="File or folder of the export.", show_default=False)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORM", help="f32, f16, bf16, q8_0 and others, depending on the format.")
    ] = None,
    over: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The base in GGUF, to verify a GGUF adapter on it.")
    ] = None,
    base: BasePath = None,
    verify: Annotated[
        str, typer.Option(help="auto, file (read back), or runtime (run, compare with the original).")
    ] = "auto",
    force: Force = False,
    other_base: OtherBase = False,
    trust: TrustRemoteCode = False,
) -> None:
    """Write a model or an adapter in the format of a runtime, and verify that it is the same model."""
    from lora_cli.export import EXPORTERS, describe

    if to == "list":
        for line in describe():
            console.out.print(line)
        return
    _choice("--to", to, *EXPORTERS, "list")
    _choice("--verify", verify, "auto", "file", "runtime")
    if target is None or out is None:
        missing = "the model, run or adapter" if target is None else "--out"
        raise LoraError(f"lora export: {missing} is missing", hint=f"lora export runs/NAME --to {to} --out PATH")
    with reserve_output_path(out):
        path = Path(os.path.expanduser(target))
        check_export_paths(out, path, find_exported_adapter(path), to=to, over=over, replace=force)
        with console.loading_libraries():
            from lora_cli.commands import export as command

        request = command.ExportRequest(to, quantize, over, base, verify, force, other_base, trust)
        command.export(target, out=out, request=request)


def _choice(option: str, value: str, *known: str) -> None:
    if value not in known:
        raise LoraError(f"{option} {value} is not known", hint=f"write {', '.join(known[:-1])} or {known[-1]}")


@app.command()
def chat(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to chat with.", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="[NAME=]DIR", help="Another adapter of the same base.")
    ] = None,
    base: BasePath = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 42,
    other_base: OtherBase = False,
) -> None:
    """Chat with a base and its adapters; /help lists the commands. Piped input is answered line by line."""
    find_chat_adapters(target, adapters or [])  # a mistake is reported before the import
    with console.loading_libraries():
        from lora_cli.commands import chat as command

    options = command.ChatOptions(temperature, max_new_tokens, system, seed)
    command.chat(target, adapters=adapters or [], base_path=base, options=options, other_base=other_base)


adapter_app = typer.Typer(help="Inspect, resize and combine LoRA adapters.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")
AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the new adapter.", show_default=False)]


@adapter_app.command()
def inspect(
    adapter: AdapterPath,
    base: BasePath = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all statistics as JSON.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot spectra and sizes.")] = None,
) -> None:
    """Print the size of an adapter's updates by kind of module, and how much of its rank they use."""
    check_output_file("--json", json_file)
    check_output_file("--plot", plot)
    folder = find_adapter(adapter)
    with console.loading_libraries():
        from lora_cli.commands.adapter import inspect as command

    command(folder, base_path=base, json_file=json_file, plot=plot)


@adapter_app.command()
def resize(
    adapter: AdapterPath,
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Components that each module keeps, at most.")] = None,
    energy: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of each update to keep.")] = None,
    force: Force = False,
) -> None:
    """Write an adapter of lower rank from the largest components, and print the energy that is kept."""
    if (rank is None) == (energy is None):
        raise LoraError("--rank and --energy: exactly one is needed", hint="write --rank 8, or --energy 0.95")
    with reserve_output_path(out):
        folder = find_adapter(adapter)
        check_output_path(out, inputs=[folder], replace=force, command="resize")
        with console.loading_libraries():
            from lora_cli.commands.adapter import resize as command

        command(folder, out=out, rank=rank, energy=energy, force=force)


@adapter_app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="[WEIGHT*]ADAPTER...", help="Adapters of one base.", show_default=False)
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="concat (exact), svd, linear, ties or dare.")] = "concat",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of svd, ties, dare; default: the largest of the adapters.")
    ] = None,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of dare's random selection.")] = 42,
    force: Force = False,
) -> None:
    """Write the weighted sum of several adapters as one."""
    _choice("--method", method, "concat", "svd", "linear", "ties", "dare")
    with reserve_output_path(out):
        folders, weights = parse_weighted_adapters(adapters)
        check_output_path(out, inputs=folders, replace=force, command="combine")
        with console.loading_libraries():
            from lora_cli.commands.adapter import combine as command

        command(folders, weights, out=out, method=method, rank=rank, density=density, seed=seed, force=force)


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of the recipes.", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come with this tool, or copy one into this folder as a starting point."""
    from lora_cli.commands import init as command

    if name is None:
        command.show_recipes()
    else:
        command.write_recipe(name)


@app.command()
def methods() -> None:
    """Print the adapter methods: what each does, its recipe keys, and what it can be combined with."""
    from lora_cli.commands.methods import show_methods

    show_methods()


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for completion and checks in editors."""
    from lora_cli.recipe.dump import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the command line; a LoraError prints its details, an `error:` and a `hint:` line, and sets the exit code."""
    with standard_streams(), handle_signals():
        _run()


def _run() -> None:
    stop_with_launcher()
    silence_library_warnings()
    try:
        with as_os_error():
            app()
    except LoraError as mistake:
        _report(mistake)
    except (OSError, MemoryError, RuntimeError) as error:
        if (found := as_lora_error(error)) is None:
            raise
        resume = ", and a run continues with --resume" if sys.argv[1:2] == ["train"] else ""
        found.hint = f"{found.hint}; files written before are complete{resume}"
        _report(found)


def _report(mistake: LoraError) -> NoReturn:
    """Print the lines of an error, and exit with its code."""
    if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
        # With several processes, the first one of this machine prints the error. When this one exits, the launcher
        # ends the others, so it waits.
        time.sleep(1)
        sys.exit(mistake.exit_code)
    print_error(mistake)
    sys.exit(mistake.exit_code)
