"""Paths in commands of messages: a shell reads each as one word, and every command of a message quotes its paths."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_cli
from lora_cli.model.foreign_adapters.detect import conversion_hint
from lora_cli.model.safetensors_header import conversion_hint as pickled_hint
from lora_cli.run.shell import python_text, shell_path

NAMES = [
    "plain-1.yaml",
    "a b",
    "it's",
    '"q"',
    "$HOME",
    "*.yaml",
    "~",
    "a;b",
    "é ü",
    "new\nline",
    "\x1b[31m",
    "\udcff",
    "\\",
]
# The end of a text in front of a value that is a word of a command.
COMMAND = re.compile(
    r"(?<![\w-])(lora (?!schema)(adapter )?[a-z]+ |ollama create [\w{}]* -f |hf download |wandb sync |show --project "
    r"|vllm serve |(write|with|add|use) --[a-z-]+ |--(lora|model-path) |-m |python -c )$"
)
QUOTING = {"shell_path", "quote"}


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_the_path(name: str):
    for path, expected in ((name, name), (Path(f"-{name}"), f"./-{name}")):
        shown = shell_path(path)
        assert shown.isprintable()
        done = subprocess.run(["bash", "-c", f"printf %s {shown}"], stdout=subprocess.PIPE, check=True)
        assert done.stdout == expected.encode(errors="surrogateescape")


def test_a_plain_path_is_written_as_it_is():
    assert shell_path(Path("runs/a-1/recipe.yaml")) == "runs/a-1/recipe.yaml"
    assert shell_path("-") == "-", "stdin"


@pytest.mark.parametrize("name", NAMES[:9])
def test_a_python_in_a_shell_reads_the_path(name: str, tmp_path: Path):
    path = tmp_path / name
    assert ast.literal_eval(python_text(path)) == str(path)
    command = pickled_hint(path).partition("python -c ")[2]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], stdout=subprocess.PIPE, check=True).stdout
    code = words.decode().removesuffix("\0")
    compile(code, "hint", "exec")
    assert str(path) in code or repr(str(path)) in code or python_text(path) in code


def test_the_hint_that_converts_a_foreign_adapter_can_be_copied():
    assert conversion_hint(Path("my adapters/a")) == "convert it: lora adapter convert 'my adapters/a' --out DIR"


def unquoted() -> Iterator[str]:
    """Yield the values in the texts of the package that are words of a command, and are not quoted."""
    for file in sorted(Path(lora_cli.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        quoted = _quoted_names(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                elif isinstance(part, ast.FormattedValue):
                    if COMMAND.search(before) and not (_is_quoted(part.value) or ast.unparse(part.value) in quoted):
                        yield f"{file.name}:{node.lineno}: {before[-30:]}{{{ast.unparse(part.value)}}}"
                    before += "{}"


def _quoted_names(tree: ast.Module) -> set[str]:
    """The variables that a quoted path is assigned to."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            names |= {ast.unparse(target) for target, value in pairs if _is_quoted(value)}
    return names


def _is_quoted(value: ast.expr) -> bool:
    if not isinstance(value, ast.Call):
        return False
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return name in QUOTING


def test_every_path_in_a_command_of_a_message_is_quoted():
    assert list(unquoted()) == [], "write {shell_path(path)}, or shlex.quote for what is no path"
