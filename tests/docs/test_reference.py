"""The references name every recipe key and every option, with what the schema and the command line say of them."""

import re
import runpy
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
import typer

from lora_cli import cli
from lora_cli.recipe.dump import recipe_schema
from tests.docs.blocks import ROOT

MAKE: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))
HOOKS: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))


@pytest.fixture(scope="module")
def recipe() -> dict[str, str]:
    """The text below each heading of the recipe reference."""
    parts = re.split(r"^### (.+)$", MAKE["recipe_reference"](), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_key_of_the_schema_is_documented(recipe: dict[str, str]):
    sections = recipe_schema()["$defs"].values()
    keys = {key for section in sections for key in section["properties"]}
    assert {path.split(".")[-1] for path in recipe} >= keys
    undocumented = [path for path, text in recipe.items() if len(text.strip().splitlines()) < 3]
    assert undocumented == []


@pytest.mark.parametrize(
    ("key", "told"),
    {
        "task": "`causal-lm` | `seq-cls` | `token-cls` | `seq2seq-lm`; default: `causal-lm`",
        "model.path": "string; required",
        "model.trust_remote_code": "`true` | `false`; default: `false`",
        "quantization.type": "`nf4` | `fp4`, or null; default: `nf4`",
        "adapter.rank": "integer at least 1, or null; default: `16`",
        "data.train": "string, or list of: [source](#source); required",
        "data.eval": "string, or number above 0 and below 1, or list of: [source](#source), or null; default: `0.05`",
        "data.columns": "mapping of names to: string, or null; default: `{}`",
        "training.learning_rate": "number above 0 and at most 10; default: `0.0002`",
        "source.max_rows": "integer at least 1, or null; default: `null`",
    }.items(),
)
def test_type_range_and_default(recipe: dict[str, str], key: str, told: str):
    assert recipe[key].strip().splitlines()[0] == told


def leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(f"{words} {name}", below)


def test_every_command_is_documented_with_all_its_options():
    parts = re.split(r"^## (.+)$", MAKE["command_reference"](), flags=re.MULTILINE)
    page = dict(zip(parts[1::2], parts[2::2], strict=True))
    commands = dict(leaves("lora", typer.main.get_command(cli.app)))
    assert page.keys() >= commands.keys()
    for words, command in commands.items():
        for parameter in command.params:
            is_option = parameter.opts[0].startswith("-")
            names = parameter.opts if is_option else [parameter.metavar or parameter.name.upper()]
            assert all(re.search(rf"^\| `[^`]*{re.escape(name)}", page[words], re.MULTILINE) for name in names), names
            assert MAKE["_sentence"](parameter.help).replace("|", "&#124;") in page[words]


def test_values_ranges_defaults_and_examples_of_a_command():
    app = typer.Typer(add_completion=False)

    @app.command(epilog="Examples:\n  x copy a b")
    def copy(
        source: Annotated[str, typer.Argument(metavar="A|B", help="What to copy.")],
        rows: Annotated[int, typer.Option(min=0, help="Rows <i>.")] = 2,
        share: Annotated[float, typer.Option(min=0, max=1, metavar="S")] = 0.5,
        name: Annotated[list[str] | None, typer.Option(help="A|B.")] = None,
        out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", show_default=False)] = ...,  # type: ignore[assignment]
        force: Annotated[bool, typer.Option("--force")] = False,
    ) -> None:
        """Copy a thing."""

    @app.command()
    def other() -> None:
        """Do nothing."""

    page = MAKE["command_reference"](app).split("## ")[1]
    assert page.splitlines() == [
        "lora copy",
        "",
        "Copy a thing.",
        "",
        "```text",
        "lora copy A|B [OPTIONS]",
        "```",
        "",
        "| | value | default | |",
        "|---|---|---|---|",
        "| `A|B` |  | required | What to copy. |",
        "| `--rows` | integer, at least 0 | `2` | Rows \\<i>. |",
        "| `--share` | `S`, at least 0, at most 1 | `0.5` |  |",
        "| `--name` | `TEXT` |  | A&#124;B. May be repeated. |",
        "| `--out, -o` | `DIR` | required |  |",
        "| `--force` |  |  |  |",
        "",
        "```text",
        "Examples:",
        "  x copy a b",
        "```",
        "",
    ]


def test_links_of_the_front_page_are_those_of_the_site():
    links: Callable[[str], str] = HOOKS["site_links"]
    text = "[a](docs/data.md#formats) [b](CONTRIBUTING.md) ![c](docs/images/c.png) [d](#e) [f](https://g.h/docs/i)"
    assert links(text) == "[a](data.md#formats) [b](contributing.md) ![c](images/c.png) [d](#e) [f](https://g.h/docs/i)"
