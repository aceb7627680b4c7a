"""Invalid recipes: the exact lines of each error, bounded time and memory, and no import of torch."""

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_cli.errors import LoraError
from lora_cli.recipe.load import MAX_BYTES, load_recipe
from lora_cli.recipe.other_tool_sources import RENAMED_IN_SOURCE, REPLACED_IN_SOURCE
from lora_cli.recipe.other_tool_values import BY_VALUE
from lora_cli.recipe.other_tools import RENAMED, REPLACED
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.recipe.suggest import all_keys

RECIPES = Path(__file__).parents[1] / "inputs" / "recipes"
GOOD = "model: {path: org/model}\ndata: {train: rows.jsonl}\n"


class InvalidRecipe(NamedTuple):
    text: str | bytes
    lines: list[str]  # as printed, without the file name and its colon
    overrides: list[str]


def parse_cases(text: str) -> Iterator[tuple[str, InvalidRecipe]]:
    """Yield the cases of a file in tests/inputs/recipes; its README describes the format."""
    for block in text.split("\n== ")[1:]:
        name, *lines = block.strip("\n").split("\n")
        expected = [line.removeprefix("=> ") for line in lines if line.startswith("=> ")]
        overrides = [line.removeprefix("$ --set ") for line in lines if line.startswith("$ ")]
        recipe = "".join(f"{line}\n" for line in lines if not line.startswith(("=> ", "$ ")))
        yield name, InvalidRecipe(recipe.replace("<good>\n", GOOD), expected, overrides)


INVALID = {
    f"{file.stem}: {name}": case
    for file in sorted(RECIPES.glob("*.txt"))
    for name, case in parse_cases(file.read_text())
} | {
    "latin-1": InvalidRecipe(b"model:\n  path: caf\xe9\n", ["2: byte 0xe9 is not UTF-8 — save the file as UTF-8"], []),
    "utf-16": InvalidRecipe(GOOD.encode("utf-16"), ["1: byte 0xff is not UTF-8 — save the file as UTF-8"], []),
    "control character": InvalidRecipe(GOOD + "output: a\x07b", ["3: a control character (U+0007) — remove it"], []),
}


def test_cases_are_found():
    assert len(INVALID) >= 80


@pytest.mark.parametrize("name", INVALID)
def test_error_has_exactly_these_lines(name: str, write):
    case = INVALID[name]
    with pytest.raises(LoraError) as error:
        load_recipe(write(case.text), case.overrides)
    lines = [line.removeprefix("r.yaml:") for line in error.value.details]
    assert lines == case.lines
    count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
    assert error.value.message == f"{count} in r.yaml"
    assert error.value.exit_code == 2
    assert all("\n" not in line and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.yaml", "missing.yaml does not exist"),
        (".", ". is a folder, not a file"),
        ("r.yaml/x", "r.yaml/x cannot be read: Not a directory"),
        ("a\0b", "a\\x00b: a path cannot contain a NUL character"),
        ("x" * 300, "..." + "x" * 197 + " cannot be read: File name too long"),
    ],
)
def test_path_that_is_not_a_file(path: str, message: str, write):
    write(GOOD)
    with pytest.raises(LoraError) as error:
        load_recipe(Path(path))
    assert error.value.message == message


def test_unreadable_file(write, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(GOOD)
    monkeypatch.setattr(os, "open", denied)  # file permissions do not stop root
    with pytest.raises(LoraError, match=r"r.yaml cannot be read: Permission denied"):
        load_recipe(path)


def test_model_file_as_recipe(write):
    with pytest.raises(LoraError, match=r"r.yaml has more than 262,144 bytes"):
        load_recipe(write(b"GGUF" + bytes(MAX_BYTES)))


LONG = {
    "alias bomb": "".join(
        [f"a0: &a0 [{','.join('x' * 9)}]\n"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)]
    ),
    "brackets": GOOD + "x: " + "[" * 10_000,
    "braces": GOOD + "x: " + "{a: " * 10_000,
    "dashes": GOOD + "x:\n" + "- " * 10_000,
    "keys of keys": "? " * 10_000,
    "items": GOOD + f"x: [{'a,' * 100_000}]",
    "keys": "".join(f"k{i}: 1\n" for i in range(4_000)),
    "one string": GOOD + "x: " + "a" * 200_000,
    "spaces": GOOD + " " * 200_000 + "x",
    "dotted --set": GOOD,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_large_texts_take_little_time_and_memory(name: str, write):
    path = write(LONG[name])
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(LoraError):
        load_recipe(path, ["a." * 10_000 + "b=1"] if "--set" in name else [])
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert seconds < 3  # about three times slower because of tracemalloc


def test_keys_of_other_tools_map_to_recipe_keys():
    keys = set(all_keys(Recipe.model_json_schema()))
    assert {name: key for name, key in RENAMED.items() if key not in keys} == {}
    assert {name: key for name, key in RENAMED_IN_SOURCE.items() if key not in SourceSpec.model_fields} == {}
    leaves = {key.rpartition(".")[2] for key in keys}
    assert (RENAMED | REPLACED | BY_VALUE).keys() & leaves == set()
    assert (RENAMED_IN_SOURCE | REPLACED_IN_SOURCE).keys() & SourceSpec.model_fields.keys() == set()


def test_errors_need_no_heavy_import(write):
    path = write("base_model: x\n")
    code = f"""
import sys
from lora_cli.errors import LoraError
from lora_cli.recipe.load import load_recipe
from pathlib import Path
try:
    load_recipe(Path({str(path)!r}))
except LoraError:
    heavy = {{"torch", "transformers", "datasets", "peft", "numpy", "pyarrow"}} & sys.modules.keys()
    print(heavy or "light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "light\n"
