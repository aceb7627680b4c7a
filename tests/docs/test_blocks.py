"""Blocks that are not run can be parsed, and name commands, options, keys, files and images that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lora_cli.recipe.load import load_recipe
from tests.docs.blocks import PAGES, ROOT, Block, read_blocks, read_commands
from tests.docs.lora_words import lora_calls, unknown_words

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
LANGUAGES = {"bash", "console", "yaml", "json", "python", "text", "dockerfile", ""}
# Pictures that are made with the commands which they show; the page is written first.
EXPECTED = {"docs/images/report.png"}


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def test_pages_use_languages_that_are_checked():
    assert {block.language for block in BLOCKS} <= LANGUAGES


@of("bash")
def test_shell_text_can_be_parsed_and_its_lora_commands_exist(block: Block):
    assert "$ " not in re.findall(r"^\$ ", block.text, re.MULTILINE), "a block with `$ ` is fenced as console"
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in lora_calls(block.text):
        assert unknown_words(words) == [], words


@of("text")
def test_lora_commands_of_a_session_exist(block: Block):
    for line in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
        for words in lora_calls(line):
            assert unknown_words(words) == [], words


@pytest.mark.parametrize("page", PAGES)
def test_lora_commands_in_the_text_exist(page: str):
    text = PAGES[page].read_text(encoding="utf-8")
    for block in read_blocks(page):
        text = text.replace(block.text, "")
    for code in re.findall(r"`(lora [^`]+)`", text):
        for words in lora_calls(" ".join(code.split())):
            assert unknown_words(words) == [], f"{page}: {code}"


@of("yaml")
def test_yaml_can_be_read_and_recipes_are_valid(block: Block, tmp_path: Path):
    tree = yaml.safe_load(block.text)
    assert isinstance(tree, dict | list)
    is_wrong = any(block.title in command.line and "error:" in command.output for command in commands_of(block.page))
    if isinstance(tree, dict) and {"model", "data"} <= tree.keys() and not (block.title and is_wrong):
        file = tmp_path / "recipe.yaml"
        file.write_text(block.text, encoding="utf-8")
        load_recipe(file)


def commands_of(page: str) -> list:
    return [
        command for block in read_blocks(page) if block.language == "console" for command in read_commands(block.text)
    ]


@of("json", "python")
def test_json_and_python_can_be_parsed(block: Block):
    if block.language == "python":
        compile(block.text, block.place, "exec")
    elif block.title.endswith(".jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    else:
        json.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str):
    text = PAGES[page].read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])((?:scripts|configs|tests|lora_cli)/[\w./-]*\w)", text)
    made = {block.title for block in read_blocks(page)}
    missing = {name for name in named if not (ROOT / name).exists() and name not in made}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES)
def test_images_and_linked_files_exist(page: str):
    """Links between pages, with their anchors, are checked when the site is built (mkdocs build --strict)."""
    path = PAGES[page]
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    made = {"recipe-reference.md", "command-reference.md", "contributing.md", "changelog.md", "index.md"}
    linked = {str((path.parent / target).relative_to(ROOT)) for target in targets if target not in made}
    assert {name for name in linked if not (ROOT / name).exists()} <= EXPECTED
