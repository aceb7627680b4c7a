"""`lora init`, `methods` and `schema`."""

import json as json_library
import sys
from typing import Annotated

import typer

from lora_cli.cli import completion
from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_json_file, write_record
from lora_cli.errors import LoraError
from lora_cli.run import console
from lora_cli.run.questions import check_terminal


@app.command(examples=["lora init", "lora init quickstart", "lora init --interactive"])
def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One of the recipes.", show_default=False, autocompletion=completion.recipe_names
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for model, rows and machine, and write a recipe that fits.")
    ] = False,
    json: Json = None,
) -> None:
    """List the recipes that come with this tool, or copy one into this folder as a starting point."""
    if interactive:
        if name is not None:
            raise LoraError("--interactive writes a recipe of its own", hint=f"leave out {name}, or --interactive")
        check_json_file(json)
        check_terminal()
        with console.loading_libraries():
            from lora_cli.commands.new_recipe import write_first_recipe

        write_record(json, {"written": write_first_recipe()})
        return
    from lora_cli.commands import init as command

    check_json_file(json)
    if name is None:
        write_record(json, {"recipes": command.show_recipes()})
    else:
        write_record(json, {"written": command.write_recipe(name)})


@app.command(examples=["lora methods", "lora methods --json methods.json"])
def methods(json: Json = None) -> None:
    """Print the adapter methods: what each does, its recipe keys, and what it can be combined with."""
    from lora_cli.commands.methods import show_methods

    check_json_file(json)
    write_record(json, {"methods": show_methods()})


@app.command(examples=["lora schema training.learning_rate", "lora schema adapter", "lora schema --json recipe.json"])
def schema(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY", help="A section or a key.", show_default=False, autocompletion=completion.schema_keys
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Print type, range, default and description of a recipe key, or the JSON Schema of a recipe for editors."""
    check_json_file(json)
    if key is not None:
        from lora_cli.commands import schema as command

        field = command.find_field(key)
        command.show_field(key, field)
        write_record(json, field)
        return
    from lora_cli.recipe.dump import recipe_schema

    if json is None:
        sys.stdout.write(json_library.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")
    write_record(json, recipe_schema())
