"""Checks of the names inside typer that lora_cli/cli uses; see `tests/laws/test_library_internals.py`."""

import typer
from typer._click.core import Context
from typer._click.exceptions import BadOptionUsage, BadParameter, MissingParameter, NoSuchOption, UsageError
from typer._click.formatting import HelpFormatter
from typer._click.shell_completion import add_completion_class, get_completion_class
from typer._coercion import bool_flag_type_descriptor
from typer._completion_classes import BashComplete
from typer.core import TyperArgument, TyperCommand, TyperOption


def small_command() -> TyperCommand:
    """Return a command with an argument, an option with a number, and a flag."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def run(name: str, count: int = typer.Option(1, min=1), force: bool = typer.Option(False, "--force")) -> None:
        pass

    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def error_of(*words: str) -> UsageError:
    """Return the usage error of a command line."""
    try:
        small_command().make_context("run", list(words))
    except UsageError as error:
        return error
    raise AssertionError(f"{words} is no error")


def usage_errors() -> None:
    """Each kind of usage error has its class, and what a message needs."""
    unknown = error_of("a", "--cuont", "2")
    assert isinstance(unknown, NoSuchOption)
    assert unknown.option_name == "--cuont"
    missing = error_of()
    assert isinstance(missing, MissingParameter)
    assert isinstance(missing.param, TyperArgument)
    bad = error_of("a", "--count", "0")
    assert isinstance(bad, BadParameter)
    assert isinstance(bad.param, TyperOption)
    assert bad.param.type_descriptor.annotation is int
    assert bad.param.min == 1
    assert bad.ctx is not None
    assert bad.ctx.command_path == "run"
    no_value = error_of("a", "--count")
    assert isinstance(no_value, BadOptionUsage)
    assert no_value.option_name == "--count"
    assert isinstance(error_of("a", "--force=1"), BadOptionUsage)
    assert error_of("a", "b").message == "Got unexpected extra argument(s) (b)"


def flags() -> None:
    """A flag can be made without a function that has it."""
    flag = TyperOption(
        param_decls=["--quiet"], type_descriptor=bool_flag_type_descriptor(), is_flag=True, default=False
    )
    command = small_command()
    command.params.append(flag)
    assert command.make_context("run", ["a", "--quiet"]).params["quiet"] is True


def help_pages() -> None:
    """The parts of a help page are methods that a class can replace."""
    command = small_command()
    formatter = HelpFormatter(width=80)
    with Context(command, info_name="run") as ctx:
        command.format_options(ctx, formatter)
        assert command.collect_usage_pieces(ctx)[0] == "[OPTIONS]"
    assert "--count" in formatter.getvalue()


def bash_completion() -> None:
    """A class for a shell can be replaced."""
    before = get_completion_class("bash")
    add_completion_class(BashComplete, "bash")
    assert get_completion_class("bash") is BashComplete
    if before is not None:
        add_completion_class(before, "bash")
