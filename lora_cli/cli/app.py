"""The typer app that the other files of this folder add their commands to."""

import typer

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
