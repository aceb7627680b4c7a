"""`lora convert`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_choice, check_json_file, write_record
from lora_cli.run.output_path import STDOUT, check_output_file

FROM = ("axolotl", "llama-factory", "trl", "torchtune", "litgpt", "mlx", "unsloth")


@app.command(
    examples=["lora convert axolotl.yml --out recipe.yaml", "lora convert train.py --from trl --accept packing"]
)
def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML or JSON; for TRL and unsloth also a script or a command line.",
            show_default=False,
        ),
    ],
    tool: Annotated[
        str | None, typer.Option("--from", metavar="TOOL", help=f"{', '.join(FROM)}; default: found from the keys.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The recipe; default: - (printed).")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A key that is not offered: write the recipe without it.")
    ] = None,
    json: Json = None,
) -> None:
    """Write a recipe from another tool's config, with a line for each key: carried, or why not."""
    if tool is not None:
        check_choice("--from", tool, *FROM)
    out = None if out == STDOUT else out
    check_output_file("--out", out)
    check_json_file(json)
    from lora_cli.commands.convert import convert as command

    write_record(json, command(file, tool=tool, out=out, accepted=accept or []))
