"""The typer app that the other files of this folder add their commands to, and what all commands have. No torch.

Every command has -h, --quiet, --verbose, two examples and the exit codes in its help. `@app.command(examples=[...])`
adds all of it; a group of commands is made by `new_group(app, "name", help=..., examples=[...])`.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer._click.exceptions import UsageError
from typer._coercion import bool_flag_type_descriptor
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from lora_cli.cli.usage_errors import ARGUMENTS, HintedError, UnknownCommand, argument_name, argument_names
from lora_cli.run import console, json_output
from lora_cli.run.library_warnings import silence_library_warnings

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter
    from typer._click.formatting import HelpFormatter

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_CODES = """\
Exit codes: 0 done, 1 failed, 2 wrong recipe, data, model or arguments,
  130 stopped by SIGINT, 143 by SIGTERM"""
COMPLETION = ("--install-completion", "--show-completion")
COMPLETE = "_LORA_COMPLETE"  # environment variable of a shell that asks for completions
JSON = "--json"
JSON_FILES = (".json", ".jsonl")
TEXT = "TEXT"  # metavar of options whose value can be empty
TO_STDOUT = "-"  # the value of --json without a file
QUIET, VERBOSE, JSON_ON_STDOUT = "lora.quiet", "lora.verbose", "lora.json"  # keys of the contexts' common `meta`


class _Command(TyperCommand):
    """A command with -q, -v and, if it has --json, with a value for that option that can be left out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)  # for the messages of usage errors
        if self.takes_json_file and not ctx.resilient_parsing:  # which completion does
            args = with_json_value(args, ctx)
        if not ctx.resilient_parsing:
            check_words(args, ctx)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: "Context") -> Any:
        quiet, verbose = ctx.meta.get(QUIET, False), ctx.meta.get(VERBOSE, False)
        if quiet and verbose:
            raise HintedError("--quiet and --verbose are both set", hint="keep one", ctx=ctx)
        as_json = bool(ctx.meta.get(JSON_ON_STDOUT))
        console.set_verbosity(be_quiet=quiet, be_verbose=verbose, no_results=as_json)
        if not verbose:
            silence_library_warnings()
        if as_json:
            json_output.reserve_stdout()
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: "Context") -> list[str]:
        return ["[OPTIONS]", *argument_names(self)]

    def get_short_help_str(self, limit: int = 45) -> str:
        return (self.help or "").partition("\n\n")[0]  # in full: the list of commands wraps its lines

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        records: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for each in self.get_params(ctx):
            if (record := each.get_help_record(ctx)) is None:
                continue
            if isinstance(each, TyperArgument):  # without typer's name of its type
                records["Arguments"].append((argument_name(each), record[1]))
            else:
                records["Options"].append(record)
        for title, found in records.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        _write_epilog(self.epilog, formatter)

    @property
    def takes_json_file(self) -> bool:
        """Whether the command has the option --json of `options.Json`, not a flag of its own."""
        return any(JSON in each.opts and isinstance(each, TyperOption) and not each.is_flag for each in self.params)


class _Group(TyperGroup):
    """The root, or a group of commands: it accepts -q and -v before the subcommand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.params.extend(_common_options())

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        if args and args[0] in COMPLETION and len(args) > 1 and not ctx.resilient_parsing:
            # typer would print that of another shell, or write into its configuration.
            raise HintedError(
                f"{args[0]} is for the shell that it is typed in, and takes nothing else",
                hint=f"start that shell, and type: lora {args[0]}",
                ctx=ctx,
            )
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: "Context", args: list[str]) -> Any:
        if args and not args[0].startswith("-") and not ctx.resilient_parsing and args[0] not in self.commands:
            raise UnknownCommand(args[0], known=list(self.commands), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        _write_epilog(self.epilog, formatter)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if COMPLETE in os.environ:  # typer has added its own completion of bash by now
            from lora_cli.cli.completion import complete_behind_equals_signs

            complete_behind_equals_signs()
        return super().main(*args, **kwargs)


class App(typer.Typer):
    """A typer app whose commands have what all commands of `lora` have."""

    def command(
        self, name: str | None = None, *, examples: Sequence[str] = (), **options: Any
    ) -> Callable[[Function], Function]:
        """Return a decorator that adds a command.

        Args:
            name: by default, the name of the function.
            examples: command lines for its help, without `$`; a test parses them.
            options: those of typer's decorator.
        """
        add: Callable[[Function], Function] = super().command(name, cls=_Command, epilog=_epilog(examples), **options)
        return add


def _epilog(examples: Sequence[str]) -> str | None:
    return "\n".join(["Examples:", *(f"  {example}" for example in examples)]) if examples else None


def _new_app(help_text: str, *, examples: Sequence[str], **options: Any) -> App:
    return App(
        help=help_text,
        epilog=_epilog(examples),
        cls=_Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **options,
    )


def new_group(parent: App, name: str, *, help: str, examples: Sequence[str]) -> App:
    """Return an app for the commands `lora NAME ...`, added to `parent`."""
    group = _new_app(help, examples=examples, add_completion=False)
    parent.add_typer(group, name=name)
    return group


def with_json_value(args: Sequence[str], ctx: "Context | None" = None) -> list[str]:
    """Return the arguments with `--json` as `--json=FILE`, FILE being `-` (stdout) where none is given.

    A file behind `--json` is known by its ending, so that `lora eval --json RUN` overwrites nothing.

    Raises:
        HintedError: something else is behind `--json`, or the option is given twice.
    """
    done: list[str] = []
    rest = list(args)
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        following = rest[0] if rest else "--"
        if arg == JSON and following.startswith("-") and following != TO_STDOUT:
            arg = f"{JSON}={TO_STDOUT}"
        elif arg == JSON and (following == TO_STDOUT or following.endswith(JSON_FILES)):
            arg = f"{JSON}={rest.pop(0)}"
        elif arg in (JSON, f"{JSON}="):
            what = (
                f"--json {following}: the name of a JSON file ends in .json" if arg == JSON else "--json= names no file"
            )
            raise HintedError(what, hint="to print to stdout, write --json last; to write a file, --json=FILE", ctx=ctx)
        done.append(arg)
    values = [arg for arg in done if arg.startswith(f"{JSON}=")]
    if len(values) > 1:
        raise HintedError("--json is given twice", hint="keep one", ctx=ctx)
    if ctx is not None and f"{JSON}={TO_STDOUT}" in values:
        ctx.meta[JSON_ON_STDOUT] = True
    return [*done, *rest]


def check_words(args: Sequence[str], ctx: "Context") -> None:
    """Check that no argument is empty, which `.` would be taken for, and that no option has two values.

    Raises:
        HintedError: one is empty, as of a variable of the shell that is not set; or an option is given twice.
    """
    options = {opt: each for each in ctx.command.params if isinstance(each, TyperOption) for opt in each.opts}
    with_value = {opt: each for opt, each in options.items() if not each.is_flag}
    hint = "write a value; a variable of the shell may not be set"
    seen: set[str] = set()
    before = ""
    for word in args:
        if word == "--" and not before:
            with_value = {}  # what follows are arguments
        name, equals, value = word.partition("=")
        option = with_value.get(before or name)
        if not word and option is None:
            raise HintedError(f"{ctx.command_path}: an argument is empty", hint=hint, ctx=ctx)
        if option is not None and (before or equals):
            if option.metavar != TEXT and not (word if before else value):
                raise HintedError(f"{option.opts[-1]}: the value is empty", hint=hint, ctx=ctx)
            if option.opts[-1] in seen and not option.multiple:
                raise HintedError(f"{option.opts[-1]} is given twice", hint="keep one", ctx=ctx)
            seen.add(option.opts[-1])
        before = word if not before and word in with_value else ""


def without_json(args: Sequence[str]) -> list[str]:
    """Return the arguments of a command without --json and its file."""
    return [arg for arg in with_json_value(args) if not arg.startswith(f"{JSON}=")]


def _common_options() -> list[TyperOption]:
    """Return new objects of the options that all commands and groups have."""
    return [
        _flag(["--quiet", "-q"], QUIET, "Print results, warnings and errors only."),
        _flag(["--verbose", "-v"], VERBOSE, "Print times, all warnings of libraries, and the causes of errors."),
    ]


def _flag(names: list[str], key: str, help_text: str) -> TyperOption:
    def note(ctx: "Context", _: "Parameter", value: bool) -> None:
        ctx.meta[key] = ctx.meta.get(key, False) or value

    descriptor = bool_flag_type_descriptor()
    return TyperOption(
        param_decls=names,
        type_descriptor=descriptor,
        is_flag=True,
        default=False,
        expose_value=False,
        callback=note,
        help=help_text,
    )


def _write_epilog(epilog: str | None, formatter: "HelpFormatter") -> None:
    """Write the examples and the exit codes; no line is wrapped, so that it can be copied."""
    for line in ["", *(epilog or "").splitlines(), *([""] if epilog else []), *EXIT_CODES.splitlines()]:
        formatter.write(f"{line}\n")


def _show_version(value: bool) -> None:
    if value:
        from lora_cli.commands.version import show_versions

        show_versions()
        raise typer.Exit


app = _new_app(
    "Fine-tune language models with LoRA and QLoRA from one YAML recipe.",
    examples=["lora init quickstart", "lora train quickstart.yaml"],
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions of lora and its libraries.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
