"""A config.json with wrong or hostile values is refused before a model of it takes time or memory."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lora_cli.errors import LoraError
from lora_cli.model.config_file import read_generation_config
from lora_cli.model.model_source import ModelSource, load_config
from tests.model import families
from tests.support import checkpoints

HOSTILE_S = 5.0  # each of these took hours, or all memory, before it was refused


@pytest.fixture
def changed(tmp_path: Path, tiny_folder: Path) -> Callable[..., Path]:
    """Return a function that copies the tiny model with other values in a JSON file."""

    def change(file: str = "config.json", **values: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_folder, folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))
        return folder

    return change


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a model type that is a number": ({"model_type": 1}, "model_type is 1: not a text"),
    "architectures in a text": ({"architectures": "Llama"}, 'architectures is "Llama": not a list of names'),
    "architectures of numbers": ({"architectures": [1]}, "architectures is [1]: not a list of names"),
    "an unknown dtype": ({"dtype": "float33"}, 'dtype is "float33": not a dtype of torch'),
    "a dtype that is a function of torch": ({"dtype": "save"}, 'dtype is "save": not a dtype of torch'),
    "ten million layers": (
        {"num_hidden_layers": 10**7},
        "at most 1,000 can be right, and the checkpoint has 21 tensors",
    ),
    "layers below zero": ({"num_hidden_layers": -1}, "num_hidden_layers is -1: below 0"),
    "no hidden size": ({"hidden_size": 0}, "hidden_size is 0: not a possible size"),
    "a hidden size below zero": ({"hidden_size": -64}, "hidden_size is -64: not a possible size"),
    "a vocabulary of 2^40": ({"vocab_size": 2**40}, "vocab_size is 1099511627776: not a possible size"),
    "a number of 400 digits": ({"attention_dropout": 10**400}, "attention_dropout is 1000"),
    "NaN": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        "rope_parameters.rope_theta is NaN",
    ),
    "a base of rotations below zero": ({"rope_theta": -1.0}, "rope_theta is -1.0: not a number above 0"),
    "an epsilon that is a text": ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6": not a number from 0 to 1'),
    "a token id that is a text": ({"eos_token_id": "2"}, 'eos_token_id is "2": not a token id'),
    "a quantization that is a list": ({"quantization_config": []}, "quantization_config is []: not an object"),
    "a name of Python": ({"__class__": "x"}, '__class__ is "x": no name of a setting'),
    "a kernel of the hub": ({"attn_implementation": "evil/kernel"}, "a kernel of the hub, whose code would run here"),
    "a kernel of the hub in a part": ({"text_config": {"_attn_implementation": "evil/kernel"}}, "whose code would run"),
    "weights in another file": ({"transformers_weights": "x.bin"}, "weights under another name are not supported"),
    "heads that do not divide the size": ({"num_attention_heads": 5}, "config.json: "),
    "heads that share no key": ({"num_key_value_heads": 3}, "which num_key_value_heads (3) does not divide"),
    "a type that transformers checks": ({"use_cache": "yes"}, "config.json: Field 'use_cache' expected bool, got str"),
    "an unknown activation": ({"hidden_act": "sulu"}, "config.json: KeyError"),
    "text in a terminal's control codes": ({"model_type": "\x1b[2J"}, r"model type `\x1b[2J`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_value_is_one_error(changed: Callable[..., Path], name: str):
    values, message = WRONG[name]
    folder = changed(**values)
    with pytest.raises(LoraError) as caught:
        checkpoints.checkpoint(folder, config=load_config(ModelSource(str(folder)))).skeleton()
    assert message in caught.value.message
    assert str(folder) in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


LARGE: dict[str, dict[str, Any]] = {
    "a hidden size of 20,000": {"hidden_size": 20_000, "head_dim": 5000},
    "100 layers of another width": {"num_hidden_layers": 100, "intermediate_size": 10**6},
    "a million experts": {"model_type": "mixtral", "num_local_experts": 10**6, "architectures": None},
    "positions up to 2^31": {"model_type": "gpt2", "max_position_embeddings": 2**31 - 1, "architectures": None},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_config_of_a_far_larger_model_costs_neither_time_nor_memory(changed: Callable[..., Path], name: str):
    folder = changed(**LARGE[name])
    start = time.process_time()
    with pytest.raises(LoraError, match=r"describes [\d,]+ parameters, but its files have 124,864"):
        checkpoints.load(folder)
    assert time.process_time() - start < HOSTILE_S


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(changed: Callable[..., Path]):
    with pytest.raises(
        LoraError, match=r"more layers than its config\.json: model\.layers\.1\.input_layernorm\.weight"
    ):
        checkpoints.load(changed(num_hidden_layers=1))


def test_the_number_of_modules_is_limited(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_cli.model.build_limits.MAX_MODULES", 20)
    folder = changed()
    with pytest.raises(LoraError, match=r"its config\.json describes more than 20 modules"):
        checkpoints.checkpoint(folder).skeleton()


def test_a_link_to_nothing_is_named(changed: Callable[..., Path]):
    folder = changed()
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("nowhere")
    with pytest.raises(LoraError, match=r"generation_config\.json is a link to nothing"):
        load_config(ModelSource(str(folder)))


@pytest.mark.parametrize("value", ["2", [None], True, -5, 2**40, {"a": 1}])
def test_a_generation_config_that_transformers_ignores_is_refused(changed: Callable[..., Path], value: Any):
    folder = changed("generation_config.json", eos_token_id=value)
    with pytest.raises(LoraError, match=r"generation_config\.json: eos_token_id is .*: not a token id"):
        read_generation_config(folder, hint="")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_config_of_every_family_is_accepted(tmp_path: Path, name: str):
    family = families.FAMILIES[name]
    families.config_of(family).save_pretrained(tmp_path)
    assert load_config(ModelSource(str(tmp_path))).model_type == AutoConfig.from_pretrained(tmp_path).model_type
