"""The command line: parse, call one function of commands/, show a user's mistake in two lines. No torch."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.library_warnings import silence_library_warnings

# What a disk or its permissions refuse is the user's to mend; any other OSError is a bug, and keeps its traceback.
DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name a place on another disk",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "see its permissions, or name another place",
    errno.EPERM: "see its permissions, or name another place",
}

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file; `lora init` has some.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the recipe: --set training.learning_rate=1e-4."),
]


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Only the recipe and the rows' format.")] = False,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 2,
) -> None:
    """Validate a recipe: rows, labels, target modules and memory, without loading weights."""
    from lora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lora_cli.commands import check as command

    if no_model:
        command.check_without_model(loaded)
    else:
        command.check(loaded, rows=rows)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Run folder, in place of the recipe's.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run that is there and start again.")] = False,
) -> None:
    """Train an adapter, and verify what was written."""
    from lora_cli.recipe.load import load_recipe

    given = [*(overrides or [])]
    given += [f"output={json.dumps(output)}"] if output else []
    given += [f"distributed.processes={processes}"] if processes else []
    loaded = load_recipe(recipe, given)
    from lora_cli.commands.train import train as command

    raise typer.Exit(command(loaded, resume=resume, fresh=fresh, arguments=sys.argv[1:]))


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN|ADAPTER", help="What to measure.", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="[NAME=]DIR", help="A further adapter, or a merged model.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to measure on, in place of data.eval.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here too.")
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="Prompts that each model answers.")] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Of the answers: exact_match, f1, rouge, bleu, chrf, json_valid or numeric_match."),
    ] = None,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every answer here.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of the lm-evaluation-harness.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="YAML files of further tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")] = None,
) -> None:
    """Measure base, adapters and merged models side by side on held-out rows."""
    if Path(target).is_file():
        from lora_cli.recipe.load import load_recipe

        load_recipe(Path(target))  # refused here, if at all: before the seconds that torch takes to import
    from lora_cli.commands.evaluate import evaluate as command
    from lora_cli.evaluation.answers import GenerationOptions

    asked = GenerationOptions(answers, metric or [], predictions, tasks or [], tasks_dir, limit)
    command(target, adapters=adapters or [], data=data, json_file=json_file, asked=asked)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged model goes.", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", metavar="PATH", help="Base, if not the adapter's own.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="Of a base that was quantised: auto (measured), original or dequantized.")
    ] = "auto",
    verify: Annotated[str, typer.Option(help="auto, tensors, or logits: with both models in memory.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file.")] = "2GB",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Take the adapter out of --base MERGED again.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Take a base that is not the one trained on.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base's repository ships.")
    ] = False,
) -> None:
    """Fold an adapter into its base, tensor by tensor, and verify what is written."""
    _choice("--dtype", dtype, "auto", "bfloat16", "float16", "float32")
    _choice("--weights", weights, "auto", "original", "dequantized")
    _choice("--verify", verify, "auto", "tensors", "logits")
    from lora_cli.commands import merge as command

    options = command.MergeOptions(
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
    command.merge(adapter, out=out, options=options)


@app.command()
def export(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL|RUN|ADAPTER", help="What to export.", show_default=False)
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="`--to list` shows them.")] = "list",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Where it goes.", show_default=False)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORM", help="f32, f16, bf16, q8_0 and others, as the format has them.")
    ] = None,
    over: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The base in GGUF, for a GGUF adapter to be proven over.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="PATH", help="Base, if not the adapter's own.")] = None,
    verify: Annotated[str, typer.Option(help="auto, file (read back), or runtime (run beside the original).")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Take a base that is not the one trained on.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base's repository ships.")
    ] = False,
) -> None:
    """Write a model or an adapter in the form that a runtime takes, and prove that it is the same model."""
    from lora_cli.export import EXPORTERS, describe

    if to == "list":
        for line in describe():
            console.out.print(line)
        return
    _choice("--to", to, *EXPORTERS, "list")
    _choice("--verify", verify, "auto", "file", "runtime")
    if target is None or out is None:
        missing = "what is to be exported" if target is None else "where it goes"
        raise LoraError(f"lora export: {missing} is not said", hint=f"lora export runs/NAME --to {to} --out PATH")
    from lora_cli.commands import export as command

    request = command.ExportRequest(to, quantize, over, base, verify, force, other_base, trust)
    command.export(target, out=out, request=request)


def _choice(option: str, given: str, *known: str) -> None:
    if given not in known:
        raise LoraError(f"{option} {given} is not known", hint=f"write {', '.join(known[:-1])} or {known[-1]}")


@app.command()
def chat(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to talk to.", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="[NAME=]DIR", help="A further adapter of the same base.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="PATH", help="Base, if not the adapter's own.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 42,
) -> None:
    """Talk to a base and its adapters; /help lists what else a line can say. A pipe is answered line by line."""
    from lora_cli.commands import chat as command

    options = command.ChatOptions(temperature, max_new_tokens, system, seed)
    command.chat(target, adapters=adapters or [], base_path=base, options=options)


adapter_app = typer.Typer(help="Look into adapters, cut them down, put them together.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")
AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the adapter goes.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@adapter_app.command()
def inspect(
    adapter: AdapterPath,
    base: Annotated[str | None, typer.Option("--base", metavar="PATH", help="Base, if not the adapter's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Every module, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Spectra and sizes as a picture.")] = None,
) -> None:
    """Show what an adapter does to each kind of module, and how much of its rank it uses."""
    from lora_cli.commands.adapter import inspect as command

    command(adapter, base_path=base, json_file=json_file, plot=plot)


@adapter_app.command()
def resize(
    adapter: AdapterPath,
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Components that each module keeps.")] = None,
    energy: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of each update to keep.")] = None,
    force: Force = False,
) -> None:
    """Write an adapter of lower rank, by its largest components, and tell what is lost."""
    from lora_cli.commands.adapter import resize as command

    command(adapter, out=out, rank=rank, energy=energy, force=force)


@adapter_app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="[WEIGHT*]ADAPTER...", help="Adapters of one base.", show_default=False)
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="concat (exact), svd, linear, ties or dare.")] = "concat",
    rank: Annotated[int | None, typer.Option(min=1, help="Of svd, ties and dare; default: the largest.")] = None,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare draws.")] = 42,
    force: Force = False,
) -> None:
    """Write the weighted sum of several adapters as one."""
    _choice("--method", method, "concat", "svd", "linear", "ties", "dare")
    from lora_cli.commands.adapter import combine as command

    command(adapters, out=out, method=method, rank=rank, density=density, seed=seed, force=force)


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of the recipes.", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come with this tool, or write one into this folder to start from."""
    from lora_cli.commands import init as command

    if name is None:
        command.show_recipes()
    else:
        command.write_recipe(name)


@app.command()
def methods() -> None:
    """Print the adapter methods: what each does, which keys it takes, what it goes with."""
    from lora_cli.commands.methods import show_methods

    show_methods()


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check it."""
    from lora_cli.recipe.dump import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the command line; a LoraError becomes its details, one `error:` and one `hint:` line, and its exit code."""
    silence_library_warnings()
    try:
        app()
    except LoraError as mistake:
        if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            # One of several processes: the first of this machine tells it, unless this exit ends it before it can.
            time.sleep(1)
            sys.exit(mistake.exit_code)
        for line in mistake.details:
            console.info(line)
        console.info(f"error: {mistake.message}")
        if mistake.hint:
            console.info(f"hint: {mistake.hint}")
        sys.exit(mistake.exit_code)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as trouble:
        if trouble.errno not in DISK:
            raise
        where = f"{trouble.filename}: " if trouble.filename else ""
        console.info(f"error: {where}{trouble.strerror}")
        onward = ", and a run goes on with --resume" if sys.argv[1:2] == ["train"] else ""
        console.info(f"hint: {DISK[trouble.errno]}; what was written before is whole{onward}")
        sys.exit(1)
