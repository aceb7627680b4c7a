"""Values that say nothing, or something else than their tool reads: none of them may change what is learnt unseen."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Outcome
from lora_cli.errors import LoraError
from tests.convert.minimal import MINIMAL


def conversion(tool: str, **changes: Any) -> Conversion:
    return convert_config(Config(Path("x.yaml"), {**MINIMAL[tool], **changes}), tool)


ALPACA = {"_component_": "torchtune.datasets.alpaca_dataset"}
LLAMA = MINIMAL["torchtune"]["model"]
OPEN: list[tuple[str, dict[str, Any], list[str]]] = [
    # What names no rows would be trained on a file that nobody named.
    ("axolotl", {"datasets": [{"type": "alpaca"}]}, ["datasets[0].path"]),
    ("axolotl", {"datasets": [{"path": None, "type": "alpaca"}]}, ["datasets[0].path"]),
    ("trl", {"dataset_name": None}, ["dataset_name"]),
    ("trl", {"dataset_name": ""}, ["dataset_name"]),
    ("trl", {"dataset_name": None, "datasets": [{"split": "train"}]}, ["datasets[0].path"]),
    ("litgpt", {"data": "JSON"}, ["data.init_args.json_path"]),
    ("litgpt", {"data": {"class_path": "JSON", "init_args": {"json_path": None}}}, ["data.init_args.json_path"]),
    ("torchtune", {"dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": None}}, ["dataset.source"]),
    ("mlx", {"hf_dataset": {"train_split": "train"}}, ["hf_dataset.path"]),
    # What adapts no part would become every layer.
    ("torchtune", {"model": {**LLAMA, "lora_attn_modules": []}}, ["model.lora_attn_modules"]),
    ("torchtune", {"model": {**LLAMA, "lora_attn_modules": None}}, ["model.lora_attn_modules"]),
    ("mlx", {"lora_parameters": {"keys": []}}, ["lora_parameters.keys"]),
    # Two at once, of which one is used.
    ("trl", {"load_in_4bit": True, "load_in_8bit": "yes"}, ["load_in_4bit"]),
    ("axolotl", {"load_in_4bit": "true", "load_in_8bit": True}, ["load_in_8bit"]),
    # The order of the rows.
    ("trl", {"train_sampling_strategy": "sequential"}, ["train_sampling_strategy"]),
    ("llama-factory", {"train_sampling_strategy": "sequential"}, ["train_sampling_strategy"]),
    ("trl", {"train_sampling_strategy": "random"}, []),
    ("trl", {"train_sampling_strategy": "group_by_length"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "changes", "keys"), OPEN)
def test_what_has_to_be_accepted(tool: str, changes: dict[str, Any], keys: list[str]):
    accepted = [key for key in conversion(tool, **changes).to_accept() if not key.endswith("train_split")]
    assert accepted == keys


@pytest.mark.parametrize("value", ["null", "none", "off", "", None, "False"])
def test_a_quantization_that_asks_for_nothing_is_none(value: Any):
    result = conversion("litgpt", quantize=value)
    assert "quantization.bits" not in result.draft.values
    assert result.to_accept() == []


def test_numbers_that_are_texts():
    result = conversion("litgpt", devices="2", train={"max_seq_length": "512", "global_batch_size": "9"})
    values = result.draft.values
    assert (values["distributed.processes"], values["training.rows_per_step"]) == (2, 8)
    with pytest.raises(LoraError, match=r"lr_warmup_steps: 0\.1 is not an integer"):  # not a tenth of all steps
        conversion("litgpt", train={"max_seq_length": 512, "lr_warmup_steps": 0.1})


def test_a_run_of_no_steps_is_none_of_a_thousand():
    assert conversion("mlx", iters=0).draft.values["training.max_steps"] == 0
    assert conversion("mlx", iters=None).draft.values["training.max_steps"] == 1000


@pytest.mark.parametrize("count", [0, "0", -1, "-1"])
def test_the_last_none_of_the_layers_of_mlx_are_all(count: Any):
    result = conversion("mlx", num_layers=count)
    assert "adapter.layers" not in result.draft.values
    (line,) = [line for line in result.lines if line.key == "num_layers"]
    assert line.outcome == Outcome.DEFAULT


@pytest.mark.parametrize(
    ("tool", "changes"),
    [
        ("axolotl", {"micro_batch_size": 0}),
        ("llama-factory", {"per_device_train_batch_size": 0}),
        ("llama-factory", {"gradient_accumulation_steps": "-1"}),
        ("torchtune", {"batch_size": 0}),
        ("litgpt", {"train": {"max_seq_length": 512, "micro_batch_size": 0}}),
        ("litgpt", {"train": {"max_seq_length": 512, "global_batch_size": -4}}),
        ("mlx", {"lora_parameters": {"rank": 0}}),
        ("mlx", {"grad_accumulation_steps": 0}),
    ],
)
def test_counts_of_nothing_are_not_the_default(tool: str, changes: dict[str, Any]):
    with pytest.raises(LoraError, match="is not above 0"):
        conversion(tool, **changes)


SECTIONS = ("dataset", "calls", "after training", "further runs", "other commands", "launcher", "set", "AutoTokenizer")


@pytest.mark.parametrize("tool", MINIMAL)
@pytest.mark.parametrize("kind", ["config", "command line"])
def test_keys_that_are_named_like_the_sections_of_scripts(tool: str, kind: str):
    for key in SECTIONS:
        for value in (5, "x", [1], None, {"a": 1}, {"a": {"b": 1}}, [{"a": 1}], True, {}):
            try:
                result = convert_config(Config(Path("x"), {**MINIMAL[tool], key: value}, kind=kind), tool)
            except LoraError as error:
                assert error.hint  # noqa: PT017
            else:
                assert any(line.key.startswith(key) for line in result.lines), (key, value)
