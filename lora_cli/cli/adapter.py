"""`lora adapter inspect`, `resize`, `combine` and `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import completion
from lora_cli.cli.app import app, new_group
from lora_cli.cli.options import (
    AdapterPath,
    BasePath,
    Force,
    Json,
    check_choice,
    check_json_file,
    choice_option,
    write_record,
)
from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.detect import TOOLS, choose_source
from lora_cli.model.model_path import check_model_path
from lora_cli.run import console
from lora_cli.run.output_path import check_output_file, check_output_path, reserve_output_path
from lora_cli.setup.adapter_folders import find_adapter, parse_weighted_adapters

adapter_app = new_group(
    app,
    "adapter",
    help="Inspect, resize, combine and convert LoRA adapters.",
    examples=["lora adapter inspect runs/quickstart", "lora adapter combine runs/a runs/b --out both"],
)
PLOTS = (".png", ".svg", ".pdf")
COMBINE_METHODS = ("concat", "svd", "linear", "ties", "dare")
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the new adapter.", show_default=False)]


@adapter_app.command(
    examples=["lora adapter inspect runs/quickstart", "lora adapter inspect runs/quickstart --json spectra.json"]
)
def inspect(
    adapter: AdapterPath,
    base: BasePath = None,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot spectra and sizes.")] = None,
) -> None:
    """Print the size of an adapter's updates by kind of module, and how much of its rank they use."""
    check_json_file(json)
    check_output_file("--plot", plot)
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise LoraError(f"--plot {plot}: the name of a plot ends in {' or '.join(PLOTS)}", hint="write --plot FILE.png")
    folder = find_adapter(adapter)
    with console.loading_libraries():
        from lora_cli.commands.adapter import inspect as command

    write_record(json, command(folder, base_path=base, plot=plot))


@adapter_app.command(
    examples=[
        "lora adapter resize runs/quickstart --rank 8 --out small",
        "lora adapter resize runs/quickstart --energy 0.95 --out small",
    ]
)
def resize(
    adapter: AdapterPath,
    out: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Components that each module keeps, at most.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Share of each update to keep.")
    ] = None,
    force: Force = False,
    json: Json = None,
) -> None:
    """Write an adapter of lower rank from the largest components, and print the energy that is kept."""
    check_json_file(json)
    if (rank is None) == (energy is None):
        raise LoraError("--rank and --energy: exactly one is needed", hint="write --rank 8, or --energy 0.95")
    with reserve_output_path(out):
        folder = find_adapter(adapter)
        check_output_path(out, inputs=[folder], replace=force, command="resize")
        with console.loading_libraries():
            from lora_cli.commands.adapter import resize as command

        record = command(folder, out=out, rank=rank, energy=energy, force=force)
    write_record(json, record)


@adapter_app.command(
    examples=[
        "lora adapter combine runs/a runs/b --out both",
        "lora adapter combine 0.7*runs/a 0.3*runs/b --method ties --out both",
    ]
)
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="[WEIGHT*]ADAPTER...",
            help="Adapters of one base.",
            show_default=False,
            autocompletion=completion.weighted_adapters,
        ),
    ],
    out: Out,
    method: Annotated[
        str, choice_option("METHOD", "concat (exact), svd, linear, ties or dare.", COMBINE_METHODS)
    ] = "concat",
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rank of svd, ties, dare; default: the largest of the adapters."),
    ] = None,
    density: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Share of entries that ties and dare keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of dare's random selection.")] = 42,
    force: Force = False,
    json: Json = None,
) -> None:
    """Write the weighted sum of several adapters as one."""
    check_json_file(json)
    check_choice("--method", method, *COMBINE_METHODS)
    with reserve_output_path(out):
        folders, weights = parse_weighted_adapters(adapters)
        check_output_path(out, inputs=folders, replace=force, command="combine")
        with console.loading_libraries():
            from lora_cli.commands.adapter import combine as command

        record = command(folders, weights, out=out, method=method, rank=rank, density=density, seed=seed, force=force)
    write_record(json, record)


@adapter_app.command(
    examples=["lora adapter convert mlx-adapters --out converted", "lora adapter convert old --from bin --out new"]
)
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder, or its file of weights.", show_default=False)
    ],
    out: Out,
    tool: Annotated[
        str | None, typer.Option("--from", metavar="TOOL", help="mlx, litgpt, torchtune or bin; default: by the files.")
    ] = None,
    base: BasePath = None,
    force: Force = False,
    json: Json = None,
) -> None:
    """Convert an adapter of mlx-lm, LitGPT, torchtune or pickled PEFT to a PEFT folder, and verify each update."""
    check_json_file(json)
    if tool is not None:
        check_choice("--from", tool, *TOOLS)
    if base is not None:
        check_model_path(base)
    with reserve_output_path(out):
        found = choose_source(source, tool)
        check_output_path(out, inputs=[found.weights], replace=force, command="convert")
        with console.loading_libraries():
            from lora_cli.commands.convert_adapter import convert as command

        record = command(found, out=out, base_path=base, force=force)
    write_record(json, record)
