"""Published configs of other tools: each key has a line, and supervised fine-tuning becomes a valid recipe."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.commands.check_without_model import check_without_model
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.detect import detect_tool
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.recipe.load import parse_recipe
from tests.convert.examples import FOLDER, Example, examples

EXAMPLES = examples()
USEFUL_SHARE = 0.98


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """dataset_info.json is looked up in `data`, as LLaMA-Factory does."""
    monkeypatch.chdir(FOLDER)


def converted(example: Example) -> Conversion:
    config = read_config(example.file)
    return convert_config(config, detect_tool(config).name)


def test_there_are_enough_examples_of_each_tool():
    counts = Counter(example.tool for example in EXAMPLES)
    assert sum(counts.values()) >= 40
    assert len(counts) == 7
    assert min(counts.values()) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_tool_is_found_from_the_keys(example: Example):
    assert detect_tool(read_config(example.file)).name == example.tool


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_each_key_has_a_line_with_a_reason(example: Example):
    conversion = converted(example)
    lines = {line.key: line for line in conversion.lines}
    for key, _ in conversion.draft.config.leaves():
        above = [done for done in lines if key == done or key.startswith((f"{done}.", f"{done}["))]
        assert above, f"{key} has no line"
    for line in conversion.lines:
        assert line.to or line.reason, line


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_supervised_fine_tuning_becomes_a_valid_recipe(example: Example, capsys: pytest.CaptureFixture[str]):
    conversion = converted(example)
    assert bool(conversion.of(Outcome.OTHER_TASK)) is example.other_task
    if example.other_task:
        return
    assert set(conversion.to_accept()) == set(example.accepted)
    recipe = parse_recipe(conversion.text, Path("recipe.yaml"))
    check_without_model(recipe)
    assert "ok: the recipe is valid" in capsys.readouterr().out


def all_lines() -> Iterator[tuple[str, Outcome]]:
    for example in EXAMPLES:
        for line in converted(example).lines:
            yield f"{example.name}: {line.key}", line.outcome


def test_the_share_of_keys_with_a_useful_line():
    outcomes = dict(all_lines())
    unknown = [key for key, outcome in outcomes.items() if outcome == Outcome.UNKNOWN]
    assert len(outcomes) > 1500
    assert 1 - len(unknown) / len(outcomes) >= USEFUL_SHARE, unknown


def test_most_examples_need_no_acceptance():
    trained = [example for example in EXAMPLES if not example.other_task]
    assert sum(not example.accepted for example in trained) / len(trained) > 0.6
