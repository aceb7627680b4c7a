"""Arguments and options that several commands share, with their completion, and what is done with --json. No torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli import completion
from lora_cli.cli.app import TO_STDOUT
from lora_cli.errors import LoraError
from lora_cli.run import atomic, json_output
from lora_cli.run.json_output import is_document
from lora_cli.run.output_path import check_output_file
from lora_cli.run.worker import is_first_of_run

RecipePath = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="YAML file, or - for stdin; `lora init` lists examples.", show_default=False),
]


def target_argument(metavar: str, help_: str) -> Any:
    """Return the argument that names a run, an adapter or a model, completed with those of this folder."""
    return typer.Argument(metavar=metavar, help=help_, show_default=False, autocompletion=completion.runs_and_adapters)


def more_adapters_option(help_: str) -> Any:
    """Return the option --adapter, which names further adapters."""
    return typer.Option("--adapter", metavar="[NAME=]DIR", help=help_, autocompletion=completion.named_adapters)


def choice_option(metavar: str, help_: str, known: Sequence[str]) -> Any:
    """Return an option with a few values, which `check_choice` checks."""
    return typer.Option(metavar=metavar, help=help_, autocompletion=completion.choices(*known))


AdapterPath = Annotated[Path, target_argument("ADAPTER", "A run, or an adapter folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a recipe key: --set training.learning_rate=1e-4.",
        autocompletion=completion.recipe_keys,
    ),
]
BasePath = Annotated[
    str | None, typer.Option("--base", metavar="PATH", help="Another base than the one that the adapter names.")
]
OtherBase = Annotated[bool, typer.Option("--other-base", help="Allow a base with other weights than in training.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code of the base's repository.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace --out if it is a result of lora.")]
# `json: Json = None`, then `check_json_file(json)` before the work and `write_record(json, record)` after it.
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="[FILE]", help="Print one JSON document instead of text, or write it to FILE.json as well."
    ),
]


def check_choice(option: str, value: str, *known: str) -> None:
    """Raise LoraError unless `value` is one of `known`."""
    if value not in known:
        raise LoraError(f"{option} {value} is not known", hint=f"write {', '.join(known[:-1])} or {known[-1]}")


def check_json_file(target: str | None) -> None:
    """Raise LoraError if the file of --json cannot be written because its folder is missing."""
    if target not in (None, TO_STDOUT):
        file = Path(str(target))
        check_output_file("--json", file)
        if os.path.isfile(file) and not is_document(file):
            raise LoraError(f"--json {file} exists, and is no document of lora", hint="name another file")


def write_record(target: str | None, record: Mapping[str, Any]) -> None:
    """Print or write the document of a command, as --json asks; None: do nothing.

    NaN and infinity become null, since JSON has neither.
    """
    if target == TO_STDOUT:
        json_output.print_document(record)
    elif target is not None and is_first_of_run():
        atomic.write_json(Path(target), json_output.strict(record))
