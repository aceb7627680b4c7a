"""The modules that a tool adapts by its defaults, in bases whose layers have other names."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.values import family_of, peft_targets
from tests.convert.minimal import MINIMAL

PARTS = ("query", "key", "value", "projection", "mlp", "head")
NONE = {f"lora_{part}": False for part in PARTS}
ALL = {f"lora_{part}": True for part in PARTS}


def litgpt(base: str, keys: dict[str, Any]) -> Conversion:
    values = {key: value for key, value in MINIMAL["litgpt"].items() if not key.startswith("lora_")}
    return convert_config(Config(Path("x.yaml"), {**values, "checkpoint_dir": base, "lora_r": 8, **keys}), "litgpt")


@pytest.mark.parametrize(
    ("base", "keys", "modules", "accepted"),
    [
        ("meta-llama/Llama-3.2-1B", {}, ["q_proj", "v_proj"], []),
        ("meta-llama/Llama-3.2-1B", {"lora_query": None, "lora_value": None}, ["q_proj", "v_proj"], []),
        ("meta-llama/Llama-3.2-1B", NONE, "all-linear", ["lora_query"]),
        ("tiiuae/falcon-7b", {}, ["query_key_value"], ["lora_query"]),
        ("tiiuae/falcon-7b", {"lora_query": None}, ["query_key_value"], ["lora_query"]),
        ("tiiuae/falcon-7b", {"lora_key": True}, ["query_key_value"], []),
        ("tiiuae/falcon-7b", ALL, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"], []),
        ("EleutherAI/pythia-1b", {"lora_projection": True}, ["query_key_value", "dense"], ["lora_query"]),
        ("microsoft/Phi-3-mini-4k-instruct", {"lora_value": False}, ["qkv_proj"], ["lora_value"]),
        ("microsoft/phi-2", {"lora_mlp": True}, ["q_proj", "v_proj", "fc1", "fc2"], []),
        ("tiiuae/Falcon3-1B-Base", {}, ["q_proj", "v_proj"], []),
    ],
)
def test_the_parts_of_litgpt(base: str, keys: dict[str, Any], modules: Any, accepted: list[str]):
    """What litgpt's defaults adapt is told also where the config has none of its keys."""
    result = litgpt(base, keys)
    assert result.draft.values["adapter.target_modules"] == modules
    assert result.to_accept() == accepted


@pytest.mark.parametrize(
    ("base", "query", "default"),
    [
        ("tiiuae/falcon-40b", "query_key_value", ["query_key_value"]),
        ("tiiuae/falcon-11B", "query_key_value", ["query_key_value"]),
        ("tiiuae/Falcon3-7B-Instruct", "q_proj", ["q_proj", "v_proj"]),
        ("tiiuae/Falcon-H1-1.5B-Base", "q_proj", ["q_proj", "v_proj"]),
        ("cognitivecomputations/dolphin-2.9-llama3-8b", "q_proj", ["q_proj", "v_proj"]),
        ("microsoft/phi-1_5", "q_proj", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("microsoft/phi-4", "qkv_proj", ["qkv_proj"]),
        ("bigcode/starcoder2-3b", "q_proj", ["q_proj", "v_proj"]),
        ("mosaicml/mpt-7b", "q_proj", ["Wqkv"]),
    ],
)
def test_the_family_of_a_name(base: str, query: str, default: list[str]):
    family = family_of(base)
    assert family.attention["q"] == query
    assert peft_targets(base) == default
    assert (family.attention["o"] == "dense") == (query == "query_key_value" or "phi-1" in base)
