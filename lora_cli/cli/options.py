"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.errors import LoraError

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


def check_choice(option: str, value: str, *known: str) -> None:
    """Raise LoraError unless `value` is one of `known`."""
    if value not in known:
        raise LoraError(f"{option} {value} is not known", hint=f"write {', '.join(known[:-1])} or {known[-1]}")
