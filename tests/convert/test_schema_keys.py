"""Every key of another tool's config classes has a line of its own, also if no example has it."""

import dataclasses
from pathlib import Path

import pytest
import transformers

from lora_cli.convert import axolotl_keys, litgpt, llama_factory, mlx, torchtune, trl
from lora_cli.convert.axolotl_data import KEYS
from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import convert_config
from lora_cli.convert.draft import Draft, Outcome
from lora_cli.convert.tables import KeyTable, apply_table
from lora_cli.errors import LoraError
from lora_cli.recipe.other_tools import RENAMED
from tests.convert import schema_keys

TABLES: dict[str, KeyTable] = {
    "axolotl": axolotl_keys.TABLE,
    "llama-factory": llama_factory.TABLE,
    "trl": trl.TABLE,
    "torchtune": torchtune.TABLE,
    "litgpt": litgpt.TABLE,
    "mlx": mlx.TABLE,
}


def fields(*classes: type) -> set[str]:
    return {field.name for each in classes for field in dataclasses.fields(each) if not field.name.startswith("_")}


def test_trl_and_transformers():
    trl_library = pytest.importorskip("trl")
    classes = (trl_library.SFTConfig, trl_library.ModelConfig, trl_library.ScriptArguments)
    assert fields(*classes) - trl.TABLE.known() == set()


def test_peft():
    import peft

    assert fields(peft.LoraConfig) - trl.TABLE.known() == set()


def test_llama_factory():
    keys = {*schema_keys.LLAMA_FACTORY.split(), *fields(transformers.Seq2SeqTrainingArguments)}
    assert keys - llama_factory.TABLE.known() == set()


def test_axolotl():
    assert set(schema_keys.AXOLOTL.split()) - axolotl_keys.TABLE.known() == set()
    assert set(schema_keys.AXOLOTL_DATASET.split()) - set(KEYS.split()) == set()


def test_mlx_and_litgpt():
    assert set(schema_keys.MLX.split()) - mlx.TABLE.known() == set()
    assert set(schema_keys.LITGPT.split()) - litgpt.TABLE.known() == set()


@pytest.mark.slow
@pytest.mark.parametrize("tool", TABLES)
def test_a_known_key_is_never_unknown(tool: str):
    """Also with a value that asks for something; keys in sections are written in them."""
    for key in sorted(TABLES[tool].known()):
        if "." in key:
            continue
        config = Config(Path("x.yaml"), {key: "1"})
        try:
            lines = convert_config(config, tool).lines
        except LoraError:  # a number where a list or a section belongs
            continue
        assert [line for line in lines if line.key == key and line.outcome == Outcome.UNKNOWN] == [], key


@pytest.mark.parametrize("tool", TABLES)
def test_carried_keys_agree_with_the_hints_for_foreign_keys(tool: str):
    """recipe/other_tools.py says what to write for a foreign key in a recipe: the key that it is carried to here."""
    for key, (to, _) in TABLES[tool].carried.items():
        if key in RENAMED:
            assert RENAMED[key] == to, key


def test_a_key_is_in_one_group_of_a_table():
    for tool, table in TABLES.items():
        words = [
            word.partition("=")[0]
            for group in (table.no_effect, table.same, table.not_offered, table.other_task)
            for keys in group.values()
            for word in keys.split()
        ]
        doubled = {word for word in words if words.count(word) > 1}
        assert doubled == set(), (tool, doubled)


def test_values_that_ask_for_nothing_need_no_acceptance():
    draft = Draft("axolotl", Config(Path("x.yaml"), {"relora": False, "s2_attention": None, "lisa_n_layers": 0}))
    apply_table(draft, axolotl_keys.TABLE)
    draft.finish(axolotl_keys.TABLE.known())
    assert {line.outcome for line in draft.lines.values()} == {Outcome.DEFAULT}
