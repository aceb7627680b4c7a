"""`lora cache`."""

from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.errors import LoraError


@app.command()
def cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what is damaged, unfinished, of an earlier version, or not used.")
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, metavar="DAYS", help="With --prune: not used for DAYS; default: 30."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Show what is in the cache: encoded rows, unpacked GGUF files and downloads, with size and last use."""
    if older_than is not None and not prune:
        raise LoraError("--older-than is for --prune", hint="add --prune, or leave it out")
    from lora_cli.commands import cache as command

    if prune:
        days = command.OLDER_THAN_DAYS if older_than is None else older_than
        command.prune_cache(older_than_days=days, as_json=as_json)
    else:
        command.show_cache(as_json=as_json)
