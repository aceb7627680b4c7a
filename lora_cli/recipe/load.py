"""Load a recipe: YAML and `--set` overrides to a checked `Recipe`, or every problem at once. No torch."""

from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.recipe.overrides import apply_overrides
from lora_cli.recipe.problem import Location, Problem, UnreadableRecipe
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.validate import validate_recipe
from lora_cli.recipe.yaml_tree import parse_yaml

MAX_BYTES = 256 * 1024  # a recipe has some kilobytes; a model named by mistake has gigabytes


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `overrides` such as `training.seed=1` laid over it.

    Raises:
        LoraError: with a line of `details` for each problem of the file and the overrides.
    """
    text = _read(path)
    try:
        tree, problems = parse_yaml(text, lambda line: Location(line, f"{path}:{line}"))
        top = Location(1, f"{path}:1")
        if tree is None:
            raise UnreadableRecipe(
                Problem(top, "", "the recipe is empty", "it needs at least model.path and data.train")
            )
        if not isinstance(tree.value, dict):
            found = "a list at the top" if isinstance(tree.value, list) else "a single value at the top"
            raise UnreadableRecipe(
                Problem(tree.place, "", found, "a recipe is made of sections: `model:`, `data:`, ...")
            )
    except UnreadableRecipe as error:
        raise _refused(path, [error.problem]) from None
    tree, problems = apply_overrides(tree, overrides, problems)
    recipe, more = validate_recipe(tree, top)
    if problems or more or recipe is None:
        raise _refused(path, [*problems, *more])
    return recipe


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise LoraError(f"{path} is a folder", hint="name the recipe, a .yaml file") from None
    except FileNotFoundError:
        raise LoraError(f"there is no file {path}", hint="name the recipe, a .yaml file") from None
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise LoraError("the recipe's name holds a null character", hint="name a .yaml file") from None
    if len(data) > MAX_BYTES:
        raise LoraError(f"{path} is larger than {MAX_BYTES // 1024} KB", hint="is it a recipe, a .yaml file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = Location(line, f"{path}:{line}")
        found = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise _refused(path, [Problem(place, "", found, "save the file as UTF-8")]) from None


def _refused(path: Path, problems: list[Problem]) -> LoraError:
    in_order = sorted(set(problems), key=lambda problem: (problem.place.order, problems.index(problem)))
    count = f"{len(in_order)} problems" if len(in_order) > 1 else "1 problem"
    return LoraError(f"{count} in {path}", details=[problem.line() for problem in in_order])
