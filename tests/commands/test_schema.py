"""`lora schema KEY`: type, range, default and description of every key, and the JSON Schema of each."""

import json
import re

import pytest

from lora_cli.commands.schema import find_field
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import all_keys
from tests.commands.conftest import Lora

KEYS = all_keys(Recipe.model_json_schema())


def test_a_key_is_described(lora: Lora):
    lines = lora("schema", "training.learning_rate").out.splitlines()
    assert lines[0] == "training.learning_rate"
    assert lines[1].startswith("  Peak learning rate.")
    assert lines[-2:] == ["  type: a number above 0 and at most 10", "  default: 0.0002"]
    assert lora("schema", "model.path").out.splitlines()[-1] == "  required"


def test_a_section_lists_its_keys(lora: Lora):
    lines = lora("schema", "quantization").out.splitlines()
    assert lines[0] == "quantization"
    assert "  bits: 4 or 8; default: 4" in lines
    assert lora("schema", "data.train.weight").out.splitlines()[-1] == "  default: 1"
    assert "  weight:" not in lora("schema", "data.train").out


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_type_a_description_and_a_schema_of_its_own(key: str, lora: Lora):
    lines = lora("schema", key).out.splitlines()
    assert lines[0] == key
    assert len(lines) >= 3
    field = find_field(key)
    referred = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(field)))
    assert referred == set(field.get("$defs", {}))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("lora_alpha", "adapter.alpha"),
        ("adapter.ranks", "adapter.rank"),
        ("trainig", "training"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(key: str, meant: str):
    with pytest.raises(LoraError) as caught:
        find_field(key)
    assert caught.value.hint == f"did you mean {meant}?"
