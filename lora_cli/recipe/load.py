"""Load a recipe: YAML and `--set` overrides to a validated `Recipe`, or all problems at once. No torch."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.recipe.dump import HEADER
from lora_cli.recipe.overrides import NO_OPTIONS, apply_overrides
from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.validate import validate_recipe
from lora_cli.recipe.yaml_tree import Node, parse_yaml
from lora_cli.run.folder import is_run
from lora_cli.run.read_file import read_bytes
from lora_cli.run.run_checksums import find_changed_records
from lora_cli.run.shell import shell_path
from lora_cli.run.standard_input import STDIN, read_stdin

MAX_BYTES = 256 * 1024  # a recipe has a few kilobytes; a model file passed by mistake has gigabytes
PASS_A_RECIPE = "pass a recipe (a .yaml file)"


def load_recipe(path: Path, overrides: Sequence[str] = (), *, options: Mapping[str, str] = NO_OPTIONS) -> Recipe:
    """Return the recipe in the YAML file `path`, or on stdin (`-`), with `overrides` such as `training.seed=1` applied.

    `options` are those of the command line that some of them stand for, as they were written.

    The recipe.yaml that a run wrote has the folder of the run as its output, also after the folder was moved.

    Raises:
        LoraError: the file cannot be read, or the recipe is invalid: `details` has a line for each problem of the
            file and the overrides.
    """
    if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet") and os.path.isfile(path):
        raise LoraError(f"{path} is a file of rows, not a recipe", hint=f"{PASS_A_RECIPE} that names it in data.train")
    data = read_stdin(limit=MAX_BYTES) if path == STDIN else read_bytes(path, limit=MAX_BYTES, hint=_meant(path))
    path = Path("<stdin>") if path == STDIN else path
    text = _decode(data, path)
    recipe = parse_recipe(text, path, overrides, options=options)
    sets_output = any(each.partition("=")[0].strip() == "output" for each in overrides)
    if path.name == "recipe.yaml" and text.startswith(HEADER) and is_run(path.parent) and not sets_output:
        return _with_output(recipe, path.parent)
    return recipe


def parse_recipe(
    text: str, path: Path, overrides: Sequence[str] = (), *, options: Mapping[str, str] = NO_OPTIONS
) -> Recipe:
    """Return the recipe in `text`, with `overrides` applied; `path` is its file in messages.

    Raises:
        LoraError: the recipe is invalid, as for `load_recipe`.
    """
    try:
        tree, problems = parse_yaml(text, lambda line: Location(line, f"{path}:{line}"))
        top = Location(1, f"{path}:1")
        if tree is None:
            raise UnreadableRecipe(
                Problem(top, "", "the recipe is empty", "it needs at least model.path and data.train")
            )
        if not isinstance(tree.value, dict):
            message = f"a {'list' if isinstance(tree.value, list) else 'single value'} at the top level"
            raise UnreadableRecipe(
                Problem(tree.location, "", message, "a recipe consists of sections: `model:`, `data:`, ...")
            )
    except UnreadableRecipe as error:
        raise _invalid_recipe(path, [error.problem]) from None
    tree, problems = apply_overrides(tree, overrides, problems, options=options)
    recipe, more = validate_recipe(tree, top)
    if problems or more or recipe is None:
        raise _invalid_recipe(path, [*problems, *more], hint=_foreign_hint(tree, path))
    return recipe


def _meant(path: Path) -> str:
    """Return the hint for a path that is no file: the recipe that was meant, if there is one."""
    if os.path.isfile(path / "recipe.yaml"):
        return f"pass the recipe of this run: {path / 'recipe.yaml'}"
    folder, names = path.parent, []
    if not os.path.lexists(path) and os.path.isdir(folder):
        names = sorted(name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else PASS_A_RECIPE


# Keys with which the configs of other tools name their base, and recipes do not.
FOREIGN_KEYS = {"base_model", "model_name_or_path", "checkpointer", "checkpoint_dir", "fine_tune_type"}


def _foreign_hint(tree: Node, path: Path) -> str | None:
    """Return a hint if the whole file looks like a config of another tool, and not only one of its keys."""
    keys = tree.value.keys() if isinstance(tree.value, dict) else set()
    return (
        f"for a config of another tool: lora convert {shell_path(path)}"
        if FOREIGN_KEYS & keys and "data" not in keys
        else None
    )


def _with_output(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with `folder` as its output; unchanged if it is this folder, however it is spelled."""
    if Path(recipe.output).resolve() == folder.resolve():
        return recipe
    return recipe.model_copy(update={"output": str(folder)})


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        location = Location(line, f"{path}:{line}")
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise _invalid_recipe(path, [Problem(location, "", message, "save the file as UTF-8")]) from None


def _invalid_recipe(path: Path, problems: list[Problem], *, hint: str | None = None) -> LoraError:
    in_order = sorted(set(problems), key=lambda problem: (problem.location.order, problems.index(problem)))
    count = f"{len(in_order)} problems" if len(in_order) > 1 else "1 problem"
    if path.name == "recipe.yaml" and any("recipe.yaml" in line for line in find_changed_records(path.parent)):
        hint = f"{path} is not as it was when this run ended: restore it from a copy"
    return LoraError(f"{count} in {path}", hint=hint, details=[problem.line() for problem in in_order])
