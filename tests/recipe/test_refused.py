"""Every bad recipe is refused with exactly its lines, quickly, in little memory, and without torch."""

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
from lora_cli.recipe.other_tools import RENAMED, RENAMED_IN_SOURCE
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.recipe.suggest import all_keys

RECIPES = Path(__file__).parents[1] / "inputs" / "recipes"
GOOD = "model: {path: org/model}\ndata: {train: rows.jsonl}\n"


class Bad(NamedTuple):
    text: str | bytes
    lines: list[str]  # as printed, less the name of the file and its colon
    sets: list[str]


def cases(text: str) -> Iterator[tuple[str, Bad]]:
    """The cases of a file in tests/inputs/recipes; its README shows how one is written."""
    for block in text.split("\n== ")[1:]:
        name, *lines = block.strip("\n").split("\n")
        said = [line.removeprefix("=> ") for line in lines if line.startswith("=> ")]
        sets = [line.removeprefix("$ --set ") for line in lines if line.startswith("$ ")]
        recipe = "".join(f"{line}\n" for line in lines if not line.startswith(("=> ", "$ ")))
        yield name, Bad(recipe.replace("<good>\n", GOOD), said, sets)


BAD = {
    f"{file.stem}: {name}": bad for file in sorted(RECIPES.glob("*.txt")) for name, bad in cases(file.read_text())
} | {
    "latin-1": Bad(b"model:\n  path: caf\xe9\n", ["2: byte 0xe9 is not UTF-8 — save the file as UTF-8"], []),
    "utf-16": Bad(GOOD.encode("utf-16"), ["1: byte 0xff is not UTF-8 — save the file as UTF-8"], []),
    "control character": Bad(GOOD + "output: a\x07b", ["3: a control character (U+0007) — remove it"], []),
}


def test_are_many():
    assert len(BAD) >= 80


@pytest.mark.parametrize("name", BAD)
def test_is_refused_with_its_lines(name: str, write):
    bad = BAD[name]
    with pytest.raises(LoraError) as refused:
        load_recipe(write(bad.text), bad.sets)
    lines = [line.removeprefix("r.yaml:") for line in refused.value.details]
    assert lines == bad.lines
    count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
    assert refused.value.message == f"{count} in r.yaml"
    assert refused.value.exit_code == 2
    assert all("\n" not in line and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.yaml", "there is no file missing.yaml"),
        (".", ". is a folder"),
        ("r.yaml/x", "r.yaml/x cannot be read: Not a directory"),
        ("a\0b", "the recipe's name holds a null character"),
    ],
)
def test_what_is_no_file(path: str, message: str, write):
    write(GOOD)
    with pytest.raises(LoraError) as refused:
        load_recipe(Path(path))
    assert refused.value.message == message


def test_unreadable_file(write, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(GOOD)
    monkeypatch.setattr(Path, "open", denied)  # root reads everything
    with pytest.raises(LoraError, match=r"r.yaml cannot be read: Permission denied"):
        load_recipe(path)


def test_a_model_named_as_recipe(write):
    with pytest.raises(LoraError, match=r"r.yaml is larger than 256 KB"):
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
    "one word": GOOD + "x: " + "a" * 200_000,
    "spaces": GOOD + " " * 200_000 + "x",
    "dotted --set": GOOD,
}


@pytest.mark.parametrize("name", LONG)
def test_large_texts_are_refused_in_a_second_and_little_memory(name: str, write):
    path = write(LONG[name])
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(LoraError):
        load_recipe(path, ["a." * 10_000 + "b=1"] if "--set" in name else [])
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert seconds < 3  # tracing alone makes it about three times slower


def test_foreign_names_lead_to_keys_that_exist():
    keys = set(all_keys(Recipe.model_json_schema()))
    assert {name: key for name, key in RENAMED.items() if key not in keys} == {}
    assert {name: key for name, key in RENAMED_IN_SOURCE.items() if key not in SourceSpec.model_fields} == {}
    leaves = {key.rpartition(".")[2] for key in keys}
    assert RENAMED.keys() & leaves == set()


def test_refusing_takes_no_heavy_import(write):
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
