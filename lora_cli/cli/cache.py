"""`lora cache`."""

from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_json_file, write_record
from lora_cli.errors import LoraError


@app.command(examples=["lora cache", "lora cache --prune --older-than 90"])
def cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what is damaged, unfinished, of an earlier version, or not used.")
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, metavar="DAYS", help="With --prune: not used for DAYS; default: 30."),
    ] = None,
    json: Json = None,
) -> None:
    """Show what is in the cache: encoded rows, unpacked GGUF files, downloads and charts, with size and last use."""
    check_json_file(json)
    if older_than is not None and not prune:
        raise LoraError("--older-than is for --prune", hint="add --prune, or leave it out")
    from lora_cli.commands import cache as command

    if prune:
        days = command.OLDER_THAN_DAYS if older_than is None else older_than
        write_record(json, command.prune_cache(older_than_days=days))
    else:
        write_record(json, command.show_cache())
