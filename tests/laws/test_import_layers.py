"""Imports go down the list of folders only; folders side by side do not import each other; there are no cycles."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_cli

ROOT = Path(lora_cli.__file__).parent
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"setup"},
    {"evaluation", "training", "export", "merging", "convert", "report"},
    {"model"},
    {"data"},
    {"recipe"},
    {"run"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports_of(source: str) -> set[str]:
    """The modules of lora_cli that `source` imports, anywhere: below `lora_cli`, dotted."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_cli"):
            module = (node.module or "").removeprefix("lora_cli").removeprefix(".")
            for alias in node.names:
                full = f"{module}.{alias.name}".removeprefix(".")
                found.add(full if full in MODULES else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lora_cli.") for a in node.names if a.name.startswith("lora_cli.")}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def is_allowed(importer: str, imported: str) -> bool:
    if room(importer) == room(imported):
        return room(importer) != "commands"
    return LEVEL[room(importer)] < LEVEL[room(imported)]


GRAPH = {module_name(file): imports_of(file.read_text()) - {module_name(file)} for file in FILES}


def test_imports_go_down():
    assert [f"{a} imports {b}" for a, imported in GRAPH.items() for b in imported if not is_allowed(a, b)] == []


def test_no_file_is_in_a_cycle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


@pytest.mark.parametrize("script", sorted((ROOT.parent / "scripts").glob("*.py")), ids=lambda script: script.name)
def test_scripts_import_names_that_exist(script: Path):
    """Nothing else runs the comparisons, so a moved name would be noticed by their next user."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_cli"):
            module = importlib.import_module(str(node.module))
            # A module is an attribute of its package only once something has imported it.
            names = {f"{node.module}.{alias.name}".removeprefix("lora_cli."): alias.name for alias in node.names}
            assert [name for full, name in names.items() if full not in MODULES and not hasattr(module, name)] == []


@pytest.mark.parametrize(
    ("importer", "line", "allowed"),
    [
        ("model.loss", "from lora_cli.data.collate import Batch", True),
        ("model.loss", "from lora_cli.training import loop", False),
        ("training.loop", "from lora_cli.evaluation import likelihood", False),
        ("commands.train", "from lora_cli.commands.check import check", False),
        ("data.cache", "import lora_cli.data.ledger", True),
        ("errors", "def f():\n    from lora_cli.run import console", False),
    ],
)
def test_the_rule_itself(importer: str, line: str, allowed: bool):
    (imported,) = imports_of(line)
    assert is_allowed(importer, imported) is allowed
