"""What another tool's YAML may have and a recipe may not: other keys than texts, tags, merge keys and their sources."""

from pathlib import Path

import pytest

from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.errors import LoraError
from lora_cli.recipe.load import parse_recipe
from tests.convert.test_scripts_and_commands import recipe_of

AXOLOTL = "base_model: a/b\nadapter: lora\nlearning_rate: 1e-4\ndatasets:\n  - {path: r.jsonl, type: chat_template}\n"


def read(folder: Path, text: str) -> Conversion:
    file = folder / "a.yml"
    file.write_text(text)
    return convert_config(read_config(file), "axolotl")


def outcomes(result: Conversion) -> dict[str, Outcome]:
    return {line.key: line.outcome for line in result.lines}


@pytest.mark.parametrize("key", ["1", "-2.5", "true", "null", "~", "on", "yes"])
def test_keys_that_are_not_texts_are_in_the_report(tmp_path: Path, key: str):
    result = read(tmp_path, f"{AXOLOTL}{key}: x\n")
    assert result.to_accept() == [key]
    assert outcomes(result)[key] == Outcome.UNKNOWN
    assert result.draft.config.places[key].endswith("a.yml:6")


def test_such_keys_in_a_section_that_has_them(tmp_path: Path):
    result = read(tmp_path, f"{AXOLOTL}max_memory: {{0: 20GB}}\nadded_tokens_overrides: {{128041: <x>}}\n")
    assert result.to_accept() == ["added_tokens_overrides"]
    assert outcomes(result)["max_memory"] == Outcome.NO_EFFECT


def test_tags_of_yaml_say_the_type(tmp_path: Path):
    text = '!!int "16"\nlora_alpha: !!float 32\nrun_name: !!str 007\nsample_packing: !!bool "false"\nrl: !!null ""\n'
    result = read(tmp_path, f"{AXOLOTL}lora_r: {text}")
    adapter = recipe_of(result).adapter
    assert (adapter.rank, adapter.alpha) == (16, 32)
    assert result.draft.config.get("run_name") == "007"
    assert outcomes(result)["rl"] == Outcome.DEFAULT
    assert result.draft.config.get("sample_packing") is False


@pytest.mark.parametrize("value", ["!env SEED", "!!python/tuple [1, 2]", "!join {a: b}", "!!int many"])
@pytest.mark.parametrize("key", ["seed", "datasets", "learning_rate"])
def test_values_that_only_an_application_knows(tmp_path: Path, value: str, key: str):
    lines = [line for line in AXOLOTL.splitlines() if not line.startswith((key, " " * (key == "datasets")))]
    result = read(tmp_path, "\n".join([*lines, f"{key}: {value}"]))
    assert key in result.to_accept()
    (line,) = [line for line in result.lines if line.key == key]
    assert value.partition(" ")[0] in line.text()
    parse_recipe(result.text, Path("r.yaml"))


def test_a_tag_within_a_source_is_in_the_report(tmp_path: Path):
    result = read(tmp_path, AXOLOTL.replace("path: r.jsonl", "path: !env ROWS"))
    assert result.to_accept() == ["datasets[0].path"]
    assert "ROWS" not in result.text


def test_a_section_as_a_key_is_an_error(tmp_path: Path):
    with pytest.raises(LoraError, match="cannot be read"):
        read(tmp_path, f"{AXOLOTL}? {{a: b}}\n: c\n")


def test_the_source_of_merged_keys_is_told_as_such(tmp_path: Path):
    base = "defaults: &d\n  lora_r: 4\n  lora_alpha: 8\n<<: *d\nlora_alpha: 16\n"
    result = read(tmp_path, base + AXOLOTL)
    adapter = recipe_of(result).adapter
    assert (adapter.rank, adapter.alpha) == (4, 16)
    assert outcomes(result)["defaults.lora_r"] == outcomes(result)["defaults.lora_alpha"] == Outcome.NO_EFFECT
    assert outcomes(result)["lora_r"] == Outcome.CARRIED


def test_a_value_that_is_named_elsewhere(tmp_path: Path):
    result = read(tmp_path, f"x-rank: &rank 4\nx-other: &other 5\n{AXOLOTL}lora_r: *rank\n")
    assert outcomes(result)["x-rank"] == Outcome.NO_EFFECT
    assert result.to_accept() == ["x-other"]  # nothing names it


def test_an_unknown_key_whose_value_is_named_elsewhere(tmp_path: Path):
    assert read(tmp_path, f"x: &x 4\n{AXOLOTL}lora_r: *x\nlora_rr: *x\n").to_accept() == ["lora_rr"]


def test_an_anchor_does_not_excuse_a_key_of_the_tool(tmp_path: Path):
    text = AXOLOTL.replace("type: chat_template", "type: chat_template, bogus: 1").replace("- {", "- &ds {")
    result = read(tmp_path, f"{text}test_datasets: [*ds]\n")
    assert result.to_accept() == ["datasets[0].bogus", "test_datasets[0].bogus"]
