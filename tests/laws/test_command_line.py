"""Every command has what all commands have: -h, -q, -v, examples that can be parsed, exit codes, --json, metavars.

A message of this file says what to add to a command that lacks it.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer._click.core import Command, Context
from typer.core import TyperArgument, TyperGroup, TyperOption

from lora_cli import cli
from lora_cli.cli.app import EXIT_CODES, JSON, _Command, _Group
from lora_cli.run import json_output

ROOT = typer.main.get_command(cli.app)
WITHOUT_JSON = {"chat": "a conversation is no document"}
# Seconds that a command may take which imports no library: far below the five that torch takes.
FAST_S = 2.0


def commands(group: Command = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    """Yield the words and the object of every group and command."""
    assert isinstance(group, TyperGroup)
    yield " ".join(path), group
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


GROUPS = {name: command for name, command in commands() if isinstance(command, TyperGroup)}
COMMANDS = {name: command for name, command in commands() if name not in GROUPS}
each_command = pytest.mark.parametrize("name", COMMANDS)


def examples(command: Command) -> list[str]:
    return [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]


def help_of(name: str, command: Command) -> str:
    with Context(command, info_name=name.rpartition(" ")[2], help_option_names=["-h", "--help"]) as ctx:
        return command.get_help(ctx)


@each_command
def test_a_command_is_made_by_our_app(name: str):
    assert isinstance(COMMANDS[name], _Command), (
        f"lora {name}: add it with @app.command(examples=[...]) of cli/app.py; a group of commands is made by "
        'new_group(app, "NAME", help=..., examples=[...]), not by typer.Typer()'
    )


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_each_has_two_examples_that_can_be_parsed(name: str):
    found = examples(COMMANDS[name] if name in COMMANDS else GROUPS[name])
    assert len(found) >= 2, f'lora {name}: add two examples: @app.command(examples=["lora {name} ...", ...])'
    for example in found:
        line = example.rpartition("|")[2].strip()
        assert line.startswith(f"lora {name}".rstrip()), f"{example}: an example of lora {name} begins with it"
        with ROOT.make_context("lora", shlex.split(line)[1:]) as ctx:
            rest = ctx._protected_args + ctx.args
            command: Command | None = ROOT
            while isinstance(command, TyperGroup):
                _, command, rest = command.resolve_command(ctx, rest)
            assert command is not None
            with command.make_context(name, rest, parent=ctx):  # raises if an option or argument is wrong
                pass
    json_output.release_stdout()


@each_command
def test_the_help_of_a_command_is_complete(name: str):
    text = help_of(name, COMMANDS[name])
    for wanted in ("-h, --help", "-q, --quiet", "-v, --verbose", "Examples:", EXIT_CODES):
        assert wanted in text, f"lora {name} --help lacks {wanted}"
    assert "<bool>" not in text
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"lora {name}: {parameter.opts[-1]} has no help text"
        is_flag = isinstance(parameter, TyperOption) and (parameter.is_flag or parameter.count)
        shown = parameter.metavar or ""
        word = shown.replace("[NAME=]", "").replace(".png", "")
        assert is_flag or (word and word == word.upper()), (
            f"lora {name}: {parameter.opts[-1]} has the metavar {shown!r}: write one in capitals: FILE, DIR, N"
        )


@each_command
def test_a_command_that_reports_has_json(name: str):
    options = {opt for each in COMMANDS[name].params for opt in each.opts}
    assert (JSON in options) is (name not in WITHOUT_JSON), (
        f"lora {name}: add `json: Json = None` (cli/options.py), check_json_file(json) before the work, and "
        "write_record(json, record) after it; or add the command to WITHOUT_JSON with the reason"
    )


@each_command
def test_an_argument_that_is_a_path_of_a_run_or_adapter_is_completed(name: str):
    for each in COMMANDS[name].params:
        words = set((each.metavar or "").replace("]", "|").strip(".").split("|"))
        if isinstance(each, TyperArgument) and words & {"RUN", "ADAPTER"}:
            assert each._custom_shell_complete is not None, (
                f"lora {name}: {each.metavar}: add autocompletion=completion.runs_and_adapters, or use AdapterPath"
            )


def test_groups_have_quiet_and_verbose_before_the_command():
    for name, group in GROUPS.items():
        assert isinstance(group, _Group), f"lora {name}: make it with new_group of cli/app.py"
        assert {"--quiet", "--verbose"} <= {opt for each in group.params for opt in each.opts}
        assert EXIT_CODES in help_of(name, group)


LIGHT = """
import sys
from lora_cli.cli import main
heavy = {"torch", "transformers", "datasets", "peft", "numpy", "pyarrow", "accelerate", "bitsandbytes", "pandas"}
for words in WORDS:
    sys.argv = ["lora", *words]
    try:
        main()
    except SystemExit as end:
        print("ended", end.code or 0)
    print("imported", *sorted(heavy & sys.modules.keys()))
"""


def test_what_needs_no_library_is_answered_without(tmp_path: Path):
    """Help, versions, usage errors, a rejected recipe, inputs and runs that are missing or there; rows need NumPy."""
    (tmp_path / "bad.yaml").write_text("model: {pth: x}\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 9)
    for name, changes in {
        "no_rows": "data: {train: none.jsonl}",
        "no_model": "model: {path: ./none}",
        "new": "",
        "trained": "output: run",
    }.items():
        keys = {"model": "model: {path: org/name}", "data": "data: {train: rows.jsonl}", "output": "output: new"}
        keys |= {changes.partition(":")[0]: changes}
        (tmp_path / f"{name}.yaml").write_text("\n".join(keys.values()))
    for name in (".lora-lock", "recipe.yaml", "adapter/adapter_config.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    fine = [[], ["--version"], *[[*name.split(), "--help"] for name in COMMANDS], ["schema", "training"], ["methods"]]
    wrong = [
        *(["trian"], ["train"], ["train", "bad.yaml"], ["train", "bad.yaml", "--lr", "1"], ["eval", "--json", "x"]),
        *([command, f"{name}.yaml"] for name in ("no_rows", "no_model") for command in ("check", "train", "eval")),
        *(["train", "trained.yaml"], ["train", "new.yaml", "--resume"], ["eval", "run", "--data", "none.jsonl"]),
        *(["merge", "run", "--out", "m", "--base", "./none"], ["chat", "run", "--base", "./none"]),
        ["export", "run", "--to", "peft", "--out", "e", "--base", "./none"],
    ]
    script = LIGHT.replace("WORDS", repr([*fine, *wrong, ["check", "new.yaml", "--no-model"]]))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )  # fmt: skip
    codes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ended")]
    assert codes == ["2", *["0"] * (len(fine) - 1), *["2"] * len(wrong), "0"], done.stderr
    imported = [line for line in done.stdout.splitlines() if line.startswith("imported")]
    assert imported == ["imported"] * len([*fine, *wrong]) + ["imported numpy"], done.stderr
    missing = ("there is no folder ./none", "none.jsonl does not exist", "contains a run already", "no run to resume")
    assert [done.stderr.count(message) for message in missing] == [6, 4, 1, 1]


def processor_seconds(words: list[str], environment: dict[str, str], folder: Path) -> float:
    """Return the processor time of `lora WORDS`, which depends little on other processes."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "lora_cli", *words], capture_output=True, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])} | environment,
    )  # fmt: skip
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["trian"], {}),
        (["train", "bad.yaml"], {}),
        ([], {"_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "lora train r.yaml --set adapter.m", "COMP_CWORD": "4"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_that_needs_no_library_comes_at_once(words: list[str], environment: dict[str, str], tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model: {pth: x}\n")
    assert min(processor_seconds(words, environment, tmp_path) for _ in range(2)) < FAST_S
