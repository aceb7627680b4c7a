"""Values whose meaning depends on the tool: false where true is the default, null, references, texts of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Line, Outcome
from lora_cli.errors import LoraError
from lora_cli.recipe.load import parse_recipe
from lora_cli.recipe.schema import Recipe
from tests.convert.minimal import MINIMAL, convert

TUNE = "torchtune.datasets."


def conversion(tool: str, **changes: Any) -> Conversion:
    return convert_config(Config(Path("x.yaml"), {**MINIMAL[tool], **changes}), tool)


def recipe_of(result: Conversion) -> Recipe:
    return parse_recipe(result.text, Path("r.yaml"))


def line_of(result: Conversion, key: str) -> Line:
    (line,) = [line for line in result.lines if line.key == key]
    return line


@pytest.mark.parametrize(
    ("tool", "key"),
    [
        ("llama-factory", "enable_thinking"),
        ("llama-factory", "ignore_pad_token_for_loss"),
        ("trl", "average_tokens_across_devices"),
        ("axolotl", "peft_autocast_adapter_dtype"),
        ("axolotl", "pretrain_multipack_attn"),
        ("torchtune", "dataset.add_eos"),
    ],
)
def test_false_is_not_the_default_of_these(tool: str, key: str):
    def changed(value: bool | None) -> dict[str, Any]:
        section, _, name = key.rpartition(".")
        return {section: {**MINIMAL[tool][section], name: value}} if section else {name: value}

    assert conversion(tool, **changed(False)).to_accept() == [key]
    assert conversion(tool, **changed(True)).to_accept() == []
    assert conversion(tool, **changed(None)).to_accept() == []


@pytest.mark.parametrize(
    ("tool", "value", "norm"),
    [
        ("trl", None, None),
        ("trl", 0, None),
        ("llama-factory", None, None),
        ("axolotl", None, 1.0),
        ("axolotl", 0, None),
        ("trl", 0.3, 0.3),
    ],
)
def test_clipping_by_null(tool: str, value: float | None, norm: float | None):
    """transformers does not clip by None; axolotl leaves it out, so it is the default."""
    assert convert(tool, max_grad_norm=value).training.max_grad_norm == norm


def test_sections_that_are_texts():
    keys = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'}
    assert convert("trl", **keys).training.min_learning_rate == 1e-6
    with pytest.raises(LoraError, match="lr_scheduler_kwargs: x is not a section"):
        conversion("trl", lr_scheduler_kwargs="x")


@pytest.mark.parametrize("tool", ["torchtune", "llama-factory"])
def test_references_to_other_keys(tool: str):
    result = conversion(tool, run="a/${name}", name="x", output_dir="${run}/out", seed="${number}", number=7)
    recipe = recipe_of(result)
    assert (recipe.output, recipe.training.seed) == ("a/x/out", 7)
    assert {line.key: line.outcome for line in result.lines}["number"] == Outcome.NO_EFFECT
    assert result.to_accept() == []


@pytest.mark.parametrize("value", ["${oc.env:RATE}", "${missing}", "${oc.env:RATE,1e-4}"])
def test_references_to_what_only_the_tool_knows(value: str):
    result = conversion("llama-factory", learning_rate=value)
    assert result.to_accept() == ["learning_rate"]
    assert "is not known here" in line_of(result, "learning_rate").reason
    recipe_of(result)


def test_arguments_that_the_base_is_loaded_with():
    options = {"torch_dtype": "float16", "attn_implementation": "sdpa", "use_cache": False}
    assert convert("trl", model_init_kwargs=options).model.dtype == "float16"
    assert conversion("trl", model_init_kwargs={**options, "num_labels": 2}).to_accept() == [
        "model_init_kwargs.num_labels"
    ]


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("axolotl", {"lora_r": 8.5}),
        ("trl", {"max_steps": 10.5}),
        ("trl", {"lora_r": "010"}),
        ("litgpt", {"optimizer": {"class_path": "AdamW", "init_args": {"betas": [0.9, "x"]}}}),
        ("torchtune", {"optimizer": {"_component_": "torch.optim.AdamW", "betas": [0.9]}}),
        ("trl", {"dataset_mixer": {"a/b": "much"}, "dataset_name": None}),
    ],
)
def test_numbers_that_are_none(tool: str, keys: dict[str, Any]):
    with pytest.raises(LoraError, match=r"not a|not two"):
        conversion(tool, **keys)


def test_llama_factory_reads_only_the_columns_that_it_names(tmp_path: Path):
    info = {
        "plain": {"file_name": "p.json"},
        "named": {"file_name": "n.json", "columns": {"prompt": "q", "response": "a"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    recipe = convert("llama-factory", dataset="plain,named", dataset_dir=str(tmp_path))
    assert isinstance(recipe.data.train, list)
    nothing = {"system": None, "history": None, "tools": None}
    assert [source.columns for source in recipe.data.train] == [
        nothing, {**nothing, "instruction": "q", "output": "a", "input": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "expected"),
    [("llama3.lora_llama3_8b", "query-response"), ("gemma.lora_gemma_2b", "prompt-completion")],
)
def test_pairs_of_torchtune_are_turns_of_the_chat_template(model: str, expected: str):
    """Where its tokenizer has one: that of Gemma writes a prompt and its answer as they are."""
    dataset = {"_component_": f"{TUNE}instruct_dataset", "source": "a/b", "column_map": {"input": "q", "output": "a"}}
    recipe = convert(
        "torchtune",
        dataset=dataset,
        model={"_component_": f"torchtune.models.{model}", "lora_attn_modules": ["q_proj"]},
    )
    assert isinstance(recipe.data.train, list)
    assert recipe.data.train[0].format == expected
    assert sorted(recipe.data.train[0].columns.values()) == ["a", "q"]


@pytest.mark.parametrize(
    ("given", "loss_on"),
    [
        ({}, "all"),
        ({"masking_strategy": "train_on_last"}, "last-turn"),
        ({"masking_strategy": "train_on_assistant"}, "assistant"),
        ({"masking_strategy": "train_on_last", "train_on_input": False}, "assistant"),
    ],
)
def test_loss_of_torchtune(given: dict[str, Any], loss_on: str):
    assert convert("torchtune", dataset={"_component_": f"{TUNE}alpaca_dataset", **given}).data.loss_on == loss_on


def test_a_list_of_datasets_of_torchtune():
    listed = [
        {"_component_": f"{TUNE}alpaca_dataset"},
        {"_component_": f"{TUNE}samsum_dataset", "train_on_input": False},
    ]
    result = conversion("torchtune", dataset=listed)
    assert result.to_accept() == ["dataset[0]._component_", "dataset[1].train_on_input"]
    assert [source.path for source in recipe_of(result).data.train] == ["tatsu-lab/alpaca", "Samsung/samsum"]  # type: ignore[union-attr]


def test_the_decay_of_adam_is_another():
    adam = {"_component_": "torch.optim.Adam", "lr": 1e-4}
    assert convert("torchtune", optimizer=adam).training.weight_decay == 0
    assert conversion("torchtune", optimizer={**adam, "weight_decay": 0.1}).to_accept() == ["optimizer.weight_decay"]
    plain = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    assert convert("litgpt", optimizer=plain).training.weight_decay == 0


def test_rows_of_litgpt():
    folder = {"class_path": "JSON", "init_args": {"json_path": "rows"}}
    data = convert("litgpt", data=folder).data
    assert data.train == "rows/train.json"
    assert [source.path for source in data.eval] == ["rows/val.json"]  # type: ignore[union-attr]
    assert conversion("litgpt", data={"class_path": "litgpt.data.Deita"}).to_accept() == ["data.class_path"]


def test_the_prompt_mask_of_mlx_leaves_the_last_answer():
    assert convert("mlx", mask_prompt=True).data.loss_on == "last-turn"


def test_pairs_of_mlx_are_turns_of_the_chat_template(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    data = convert("mlx", data=str(tmp_path)).data
    assert isinstance(data.train, list)
    assert data.train[0].format == "query-response"
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    assert convert("mlx", data=str(tmp_path)).data.train == f"{tmp_path}/train.jsonl"
    assert "write format: query-response" in line_of(conversion("mlx", data="./absent"), "data").reason


def test_datasets_of_the_hub_in_mlx():
    one = {"path": "a/b", "prompt_feature": "q", "completion_feature": "a", "train_split": "train"}
    result = conversion("mlx", hf_dataset=[one, {"path": "c/d", "text_feature": "x"}])
    assert result.to_accept() == ["hf_dataset[1].train_split"]  # of which mlx-lm takes four fifths
    data = recipe_of(result).data
    assert isinstance(data.train, list)
    assert [source.format for source in data.train] == ["query-response", "text"]
    assert data.eval == 0.1


def test_another_tokenizer_s_template_is_not_the_base_s(tmp_path: Path):
    key = "chat_template_path"
    base = MINIMAL["trl"]["model_name_or_path"]
    assert line_of(conversion("trl", chat_template_path=base), key).outcome == Outcome.DEFAULT
    assert conversion("trl", chat_template_path=f"{base}-Chat").to_accept() == [key]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    carried = conversion("trl", chat_template_path=str(tmp_path))
    assert recipe_of(carried).data.chat_template == str(tmp_path / "chat_template.jinja")


def test_options_of_trl_s_datasets_are_judged_one_by_one():
    harmless = {"skip_prepare_dataset": False, "add_special_tokens": False, "append_concat_token": True}
    assert conversion("trl", dataset_kwargs=harmless).to_accept() == []
    refused = conversion("trl", dataset_kwargs={**harmless, "skip_prepare_dataset": True})
    assert refused.to_accept() == ["dataset_kwargs.skip_prepare_dataset"]


@pytest.mark.parametrize(("roles", "accept"), [(["assistant"], False), ([], True), (None, False), (["user"], True)])
def test_no_role_to_train_is_not_the_assistant(roles: Any, accept: bool):
    rows = [{"path": "rows.jsonl", "type": "chat_template", "roles_to_train": roles}]
    assert conversion("axolotl", datasets=rows).to_accept() == ["datasets[0].roles_to_train"] * accept


def test_older_names_of_axolotl_s_keys_are_known():
    older = {"model_revision": "v1", "model_kwargs": {"attn_implementation": "eager"}}
    result = conversion("axolotl", **older)
    assert recipe_of(result).model.revision == "v1"
    assert result.to_accept() == []
    assert conversion("axolotl", model_config={"rope_theta": 1e6}).to_accept() == ["model_config"]


@pytest.mark.parametrize(
    ("tool", "changes"),
    [
        ("mlx", {"optimizer": "adamw", "optimizer_config": {"adamw": {"betas": [0.9, 0.98]}}}),
        ("litgpt", {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.98]}}}),
        ("mlx", {"mask_prompt": False}),
    ],
)
def test_what_is_written_is_not_called_a_default(tool: str, changes: dict[str, Any]):
    assumed = {each.to for each in conversion(tool, **changes).draft.assumed}
    assert not assumed & {"training.adam_beta1", "training.adam_beta2"}
    assert ("data.loss_on" in assumed) == ("mask_prompt" not in changes)
