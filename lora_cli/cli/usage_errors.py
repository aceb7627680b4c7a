"""Usage errors of typer in the style of all other errors: an `error:` line, and a `hint:` line with did-you-mean."""

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from typer._click.exceptions import BadOptionUsage, BadParameter, MissingParameter, NoSuchOption, UsageError
from typer.core import TyperArgument, TyperOption

from lora_cli.errors import LoraError

if TYPE_CHECKING:
    from typer._click.core import Command, Context

ARGUMENTS = "lora.arguments"  # key of the contexts' common `meta`: the words behind the command
# What other tools call a command. A command of this name, if there is one, comes first.
OTHER_TOOLS = {
    "finetune": "lora train",
    "fine-tune": "lora train",
    "sft": "lora train",
    "fit": "lora train",
    "resume": "lora train RECIPE --resume",
    "evaluate": "lora eval",
    "test": "lora eval",
    "generate": "lora chat",
    "infer": "lora chat",
    "inference": "lora chat",
    "run": "lora runs, or lora chat",
    "fuse": "lora merge",
    "quantize": "lora export MODEL --to gguf --quantize q8_0",
    "validate": "lora check",
    "preprocess": "lora check",
    "new": "lora init",
    "inspect": "lora adapter inspect",
    "combine": "lora adapter combine",
    "resize": "lora adapter resize",
    "version": "lora --version",
    "help": "lora --help",
}


class HintedError(UsageError):
    """A usage error that says how to fix it."""

    def __init__(self, message: str, *, hint: str, ctx: "Context | None" = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


class UnknownCommand(HintedError):
    """A word in the place of a command that is none."""

    def __init__(self, name: str, *, known: Sequence[str], ctx: "Context") -> None:
        """`known` are the commands that there are."""
        path = ctx.command_path
        close = get_close_matches(name.lower(), known, n=1)
        meant = OTHER_TOOLS.get(name.lower()) if ctx.parent is None else None
        if meant is None and close:
            meant = f"{path} {close[0]}"
        hint = f"did you mean {meant}?" if meant else f"write one of {', '.join(known)}"
        super().__init__(f"{path} has no command {name}", hint=hint, ctx=ctx)


def argument_names(command: "Command") -> list[str]:
    """Return how the help writes the arguments of a command: `RECIPE`, `[NAME]`, `ADAPTER...`."""
    arguments = [each for each in command.params if isinstance(each, TyperArgument)]
    return [argument_name(each) if each.required else f"[{argument_name(each)}]" for each in arguments]


def argument_name(argument: TyperArgument) -> str:
    """Return the name of an argument: its metavar, with dots behind it if it can be given several times."""
    name = (argument.metavar or argument.name.upper()).removesuffix("...")
    return f"{name}..." if argument.nargs == -1 else name


def as_lora_error(error: UsageError) -> LoraError:
    """Return a usage error as our own; its exit code is 2."""
    message, hint = _describe(error)
    return LoraError(message, hint=hint)


def _describe(error: UsageError) -> tuple[str, str]:
    ctx = error.ctx
    command = ctx.command_path if ctx else "lora"
    see = f"see {command} --help"
    match error:
        case HintedError(hint=hint):
            return error.message, hint
        case NoSuchOption(option_name=name):
            return f"{command} has no option {name}", _hint_for_option(name, ctx) or see
        case MissingParameter(param=TyperArgument() as argument):
            return f"{command}: {argument_name(argument)} is missing", _usage(ctx)
        case MissingParameter(param=TyperOption() as option):
            return f"{command}: {option.opts[-1]} is missing", f"add {_with_value(option)}"
        case BadParameter() if closed := re.search(r"[Pp]ath '(.*)' is not readable", error.message):
            return f"{closed[1]} cannot be read: Permission denied", "check its permissions"
        case BadParameter(param=TyperOption() as option):
            written = f"{option.opts[-1]} {_written_value(option.opts, ctx)}".rstrip()
            if (expected := _expected(option)) is None:
                return f"{written}: {_problem(error.message)}", see
            return f"{written} is not {expected}", f"write {_with_value(option)}, {expected}; {see}"
        case BadOptionUsage(option_name=name):
            options = ctx.command.params if ctx else []
            found = next((each for each in options if isinstance(each, TyperOption) and name in each.opts), None)
            if found is None or found.is_flag:
                return f"{name} takes no value", f"write {name} alone"
            return f"{name}: its value is missing", f"write {_with_value(found)}"
        case _ if extra := re.search(r"unexpected extra argument\(s\) \((.*)\)$", error.message):
            return f"{command}: unexpected argument {extra[1]}", _usage(ctx)
        case _:
            return _problem(error.message), see


def _hint_for_option(name: str, ctx: "Context | None") -> str | None:
    """Return which option of the command, or which key of a recipe, was meant; None if nothing is close."""
    if ctx is None:
        return None
    names = [opt for each in ctx.command.get_params(ctx) for opt in each.opts if opt.startswith("--")]
    if not name.startswith("--"):  # of `-set`, the parser names `-s`
        words = ctx.meta.get(ARGUMENTS, ())
        name = next((f"-{word}" for word in words if word.startswith(name) and len(word) > 2), name)
    if ctx.parent is None and (owner := _command_with(name, ctx)):
        return f"write it behind the command: lora {owner} {name}"
    if name not in names and _is_argument(name, ctx.command):
        return f"it is no option: {_usage(ctx)}"
    close = get_close_matches(name, names, n=1)
    if name not in names and "--set" in names and (key := _recipe_key(name)):
        value = _written_value([name], ctx)
        setting = f"{key}={value if value[:1] not in ('', '-') else 'VALUE'}"
        return f"it is a key of the recipe: write --set {shlex.quote(setting)}"
    return f"did you mean {close[0]}?" if close else None


def _is_argument(option: str, command: "Command") -> bool:
    """Return whether an option is called like an argument of the command, as in other tools: `--recipe`, `--config`."""
    words = {word for each in argument_names(command) for word in re.findall(r"[A-Z]+", each)}
    return option.lstrip("-").upper() in words | ({"CONFIG"} if "RECIPE" in words else set())


def _command_with(option: str, ctx: "Context") -> str | None:
    """Return the command that is written in a command line and has an option; None if there is none."""
    commands = getattr(ctx.command, "commands", {})
    words = [word for word in ctx.meta.get(ARGUMENTS, ()) if word in commands]
    return next((word for word in words if any(option in each.opts for each in commands[word].params)), None)


def _recipe_key(option: str) -> str | None:
    """Return the key that is called like `--learning-rate`, or that another tool calls so; None if there is none."""
    from lora_cli.recipe.schema import Recipe
    from lora_cli.recipe.suggest import find_key

    return find_key(option.lstrip("-"), Recipe.model_json_schema()) if option.startswith("--") else None


def _expected(option: TyperOption) -> str | None:
    """Return the numbers that an option accepts, in words; None for an option of another type."""
    kinds: dict[object, str] = {int: "an integer", float: "a number"}
    kind = kinds.get(option.type_descriptor.annotation)
    if kind is None:
        return None
    if option.min is not None and option.max is not None:
        return f"{kind} from {option.min:g} to {option.max:g}"
    return kind if option.min is None else f"{kind} of at least {option.min:g}"


def _written_value(names: Sequence[str], ctx: "Context | None") -> str:
    """Return the value of an option with one of `names` as the user wrote it; empty if it is not found."""
    words = list(ctx.meta.get(ARGUMENTS, ())) if ctx else []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else "".join(words[number + 1 : number + 2])
    return ""


def _with_value(option: TyperOption) -> str:
    return f"{option.opts[-1]} {option.metavar or 'VALUE'}"


def _usage(ctx: "Context | None") -> str:
    return f"write {' '.join([ctx.command_path, *argument_names(ctx.command)])}" if ctx else "see lora --help"


def _problem(text: str) -> str:
    """Return typer's text in one line, without a capital letter or a full stop."""
    line = " ".join(text.split()).rstrip(".")
    return line[:1].lower() + line[1:] if line[:2].istitle() else line
