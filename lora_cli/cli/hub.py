"""`lora push`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_json_file, target_argument, write_record
from lora_cli.errors import LoraError
from lora_cli.run.hub_account import check_repository_name, why_no_upload
from lora_cli.run.shell import shell_path
from lora_cli.setup.publishable import find_publishable


@app.command(examples=["lora push runs/quickstart me/my-adapter --dry-run", "lora push merged me/my-model --private"])
def push(
    target: Annotated[Path, target_argument("RUN|ADAPTER|MODEL", "What to publish; of a run, its adapter.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, and upload nothing.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Upload to a repository with other files; those of the same name are replaced."),
    ] = False,
    json: Json = None,
) -> None:
    """Publish an adapter, a model or an export on the Hugging Face hub, and compare what arrived."""
    check_json_file(json)
    if not os.path.exists(target) and os.path.exists(repository):
        raise LoraError(
            f"{target} does not exist: the repository comes behind the result",
            hint=f"write lora push {shell_path(repository)} {shell_path(target)}",
        )
    check_repository_name(repository)
    result = find_publishable(target)
    if not dry_run and (refused := why_no_upload()) is not None:
        raise refused
    from lora_cli.commands import push as command

    request = command.PushRequest(private=private, dry_run=dry_run, force=force)
    write_record(json, command.push(result, repository, request=request))
