"""Usage errors: one `error:` and one `hint:` line, exit code 2, and the word that was meant."""

import pytest

from lora_cli.cli.app import EXIT_CODES
from tests.commands.conftest import Lora

USAGE_ERRORS = {
    "trian recipe.yaml": ("lora has no command trian", "did you mean lora train?"),
    "finetune recipe.yaml": ("lora has no command finetune", "did you mean lora train?"),
    "SFT recipe.yaml": ("lora has no command SFT", "did you mean lora train?"),
    "evaluate runs/a": ("lora has no command evaluate", "did you mean lora eval?"),
    "generate": ("lora has no command generate", "did you mean lora chat?"),
    "run runs/a": ("lora has no command run", "did you mean lora runs, or lora chat?"),
    "fuse runs/a": ("lora has no command fuse", "did you mean lora merge?"),
    "inspect runs/a": ("lora has no command inspect", "did you mean lora adapter inspect?"),
    "adapter inspct runs/a": ("lora adapter has no command inspct", "did you mean lora adapter inspect?"),
    "train": ("lora train: RECIPE is missing", "write lora train RECIPE"),
    "train a.yaml b.yaml": ("lora train: unexpected argument b.yaml", "write lora train RECIPE"),
    "train recipe.yaml --outptu x": ("lora train has no option --outptu", "did you mean --output?"),
    "train recipe.yaml -output x": ("lora train has no option -o", "did you mean --output?"),
    "train --config a.yaml": ("lora train has no option --config", "it is no option: write lora train RECIPE"),
    "--json runs": ("lora has no option --json", "write it behind the command: lora runs --json"),
    "train recipe.yaml --lr 1e-4": (
        "lora train has no option --lr",
        "it is a key of the recipe: write --set training.learning_rate=1e-4",
    ),
    "check recipe.yaml --lora-r=8": (
        "lora check has no option --lora-r",
        "it is a key of the recipe: write --set adapter.rank=8",
    ),
    "train recipe.yaml --epochs": (
        "lora train has no option --epochs",
        "it is a key of the recipe: write --set training.epochs=VALUE",
    ),
    "train recipe.yaml --processes 0": (
        "--processes 0 is not an integer of at least 1",
        "write --processes N, an integer of at least 1; see lora train --help",
    ),
    "train recipe.yaml --processes=two": (
        "--processes two is not an integer of at least 1",
        "write --processes N, an integer of at least 1; see lora train --help",
    ),
    "adapter resize runs/a --out b --energy 3": (
        "--energy 3 is not a number from 0 to 1",
        "write --energy SHARE, a number from 0 to 1; see lora adapter resize --help",
    ),
    "merge runs/a": ("lora merge: --out is missing", "add --out DIR"),
    "merge runs/a --out": ("--out: its value is missing", "write --out DIR"),
    "merge runs/a --out b --force=1": ("--force takes no value", "write --force alone"),
    "eval --json runs/a": (
        "--json runs/a: the name of a JSON file ends in .json",
        "to print to stdout, write --json last; to write a file, --json=FILE",
    ),
    "eval runs/a --json=": (
        "--json= names no file",
        "to print to stdout, write --json last; to write a file, --json=FILE",
    ),
    "methods --json a.json --json": ("--json is given twice", "keep one"),
    "merge runs/a --out a --out=b": ("--out is given twice", "keep one"),
    "-q methods -v": ("--quiet and --verbose are both set", "keep one"),
    "schema adapter.metod": ("a recipe has no key adapter.metod", "did you mean adapter.method?"),
    "schema lora_r": ("a recipe has no key lora_r", "did you mean adapter.rank?"),
    "schema data.train[0].weigth": ("a recipe has no key data.train[0].weigth", "did you mean data.train.weight?"),
    "schema task.x": ("task.x is not a key of a recipe: task has no keys", "lora schema task"),
}


@pytest.mark.parametrize("command", USAGE_ERRORS)
def test_a_usage_error_is_two_lines(command: str, lora: Lora):
    result = lora(*command.split())
    error, hint = USAGE_ERRORS[command]
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [f"error: {error}", f"hint: {hint}"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", ""], "lora train: an argument is empty"),
        (["train", "recipe.yaml", "--output", ""], "--output: the value is empty"),
        (["train", "recipe.yaml", "--output="], "--output: the value is empty"),
        (["train", "recipe.yaml", "--resume", ""], "lora train: an argument is empty"),
        (["eval", "runs/a", "--data", ""], "--data: the value is empty"),
        (["merge", "runs/a", "--out", ""], "--out: the value is empty"),
        (["check", "recipe.yaml", "--set", ""], "--set: the value is empty"),
        (["adapter", "inspect", ""], "lora adapter inspect: an argument is empty"),
        (["runs", ""], "lora runs: an argument is empty"),
    ],
)
def test_an_empty_argument_is_not_the_working_folder(words: list[str], problem: str, lora: Lora):
    result = lora(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        f"error: {problem}", "hint: write a value; a variable of the shell may not be set"
    ]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["adapter"]])
def test_without_a_command_the_help_is_printed(words: list[str], lora: Lora):
    result = lora(*words)
    assert (result.code, result.err) == (2, "")
    assert result.out.startswith(f"Usage: {' '.join(['lora', *words])} [OPTIONS] COMMAND")
    assert "─" not in result.out, "no boxes"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_flags_examples_and_exit_codes(option: str, lora: Lora):
    result = lora("train", option)
    assert result.code == 0
    lines = [line.strip() for line in result.out.splitlines()]
    assert any(line.startswith("--resume  ") for line in lines)
    assert any(line.startswith("--processes N  ") for line in lines)
    assert any(line.startswith("RECIPE  ") for line in lines)
    assert "lora train recipe.yaml" in lines
    assert lines[-2:] == EXIT_CODES.replace("\n  ", "\n").splitlines()


def test_version_prints_those_of_the_libraries(lora: Lora):
    from importlib.metadata import version

    result = lora("--version")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1:] == [
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    ]
    assert result.out.startswith("lora 0.")
