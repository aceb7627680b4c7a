"""`lora init`, `methods` and `schema`."""

import json
import sys
from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.questions import check_terminal


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of the recipes.", show_default=False)
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for model, rows and machine, and write a recipe that fits.")
    ] = False,
) -> None:
    """List the recipes that come with this tool, or copy one into this folder as a starting point."""
    if interactive:
        if name is not None:
            raise LoraError("--interactive writes a recipe of its own", hint=f"leave out {name}, or --interactive")
        check_terminal()
        with console.loading_libraries():
            from lora_cli.commands.new_recipe import write_first_recipe

        write_first_recipe()
        return
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
