"""What ends a run and which step is its result, where keys and defaults of another tool bound each other."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Line, Outcome
from lora_cli.recipe.load import parse_recipe
from lora_cli.recipe.schema import Recipe
from tests.convert.minimal import MINIMAL, convert

HELD_OUT = {"val_set_size": 0.1}
TRAIN = {"max_seq_length": 512, "max_steps": 200}


def conversion(tool: str, **changes: Any) -> Conversion:
    return convert_config(Config(Path("x.yaml"), {**MINIMAL[tool], **changes}), tool)


def line_of(result: Conversion, key: str) -> Line:
    (line,) = [line for line in result.lines if line.key == key]
    return line


def recipe_of(result: Conversion) -> Recipe:
    return parse_recipe(result.text, Path("r.yaml"))


@pytest.mark.parametrize(
    ("tool", "keys", "key", "told"),
    [
        ("litgpt", {"train": TRAIN}, "train.max_steps", "litgpt ends after 5 epochs"),
        ("axolotl", {"max_steps": 9}, "max_steps", "axolotl ends after num_epochs, if that is earlier"),
        ("torchtune", {"epochs": 3, "max_steps_per_epoch": 9}, "max_steps_per_epoch", "each of which has as many"),
    ],
)
def test_a_number_of_steps_that_epochs_bound(tool: str, keys: dict[str, Any], key: str, told: str):
    result = conversion(tool, **keys)
    assert told in line_of(result, key).reason
    assert recipe_of(result).training.max_steps == (27 if tool == "torchtune" else keys.get("max_steps", 200))


def test_a_default_warmup_that_is_longer_than_the_run():
    result = conversion("litgpt", train={**TRAIN, "max_steps": 20})
    assert result.to_accept() == ["warmup"]
    assert "default has 100 steps" in line_of(result, "warmup").reason
    assert recipe_of(result).training.warmup == 20
    assert not [each for each in result.draft.assumed if each.to == "training.warmup"]


BEST: list[tuple[dict[str, Any], bool]] = [
    ({**HELD_OUT, "load_best_model_at_end": True, "eval_steps": 50, "save_steps": 100}, True),
    ({**HELD_OUT, "early_stopping_patience": 2, "eval_steps": 50, "save_steps": 100}, True),
    ({"load_best_model_at_end": True, "eval_steps": 50, "save_steps": 100}, False),
    ({**HELD_OUT, "load_best_model_at_end": True, "eval_steps": 50, "save_steps": 70}, False),
    ({**HELD_OUT, "load_best_model_at_end": True, "eval_steps": 50}, False),
    ({**HELD_OUT, "eval_steps": 50, "save_steps": 100}, False),
]


@pytest.mark.parametrize(("keys", "kept"), BEST)
def test_when_axolotl_keeps_the_best_step(keys: dict[str, Any], kept: bool):
    result = conversion("axolotl", **keys)
    assert recipe_of(result).training.keep == ("best" if kept else "last")
    if not kept and keys.get("load_best_model_at_end"):
        assert line_of(result, "load_best_model_at_end").outcome == Outcome.NO_EFFECT


@pytest.mark.parametrize(
    ("tool", "keys", "refused"),
    [
        ("axolotl", {"evals_per_epoch": 2, "saves_per_epoch": 2, "num_epochs": 3}, ["evals_per_epoch"]),
        ("axolotl", {"eval_steps": 0.1, "save_steps": 0.1}, ["eval_steps"]),
        ("axolotl", {"evals_per_epoch": 2, "saves_per_epoch": 1, "num_epochs": 1}, []),  # not saved: no best step
        ("trl", {"eval_strategy": "steps", "eval_steps": 0.1}, ["eval_steps"]),
        ("trl", {"eval_strategy": "epoch"}, ["eval_strategy"]),
    ],
)
def test_evaluations_that_decide_which_step_is_kept_are_counted_in_steps(
    tool: str, keys: dict[str, Any], refused: list[str]
):
    held_out = HELD_OUT if tool == "axolotl" else {}
    assert conversion(tool, load_best_model_at_end=True, **held_out, **keys).to_accept() == refused
    assert conversion(tool, **held_out, **keys).to_accept() == []


def test_evaluations_without_a_number_of_steps_are_made_when_it_logs():
    keys = {"eval_strategy": "steps", "load_best_model_at_end": True}
    assert convert("trl", **keys, logging_steps=30).training.eval_every == 30
    assert convert("trl", **keys).training.eval_every == 500
    assert convert("trl", eval_strategy="steps", logging_steps=30).training.eval_every == 100


def test_the_best_of_the_saved_steps_is_not_the_best_of_all():
    keys = {"eval_strategy": "steps", "eval_steps": 50, "load_best_model_at_end": True}
    assert "every 100" in line_of(conversion("trl", **keys, save_steps=100), "load_best_model_at_end").reason
    assert line_of(conversion("trl", **keys, save_steps=50), "load_best_model_at_end").reason == ""


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"metric_for_best_model": "eval_loss", "greater_is_better": False}, []),
        ({"metric_for_best_model": "eval_rouge1"}, ["metric_for_best_model"]),
        ({"greater_is_better": True}, ["greater_is_better"]),
    ],
)
def test_the_metric_of_the_best_step(keys: dict[str, Any], refused: list[str]):
    best = {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 50, "load_best_model_at_end": True}
    assert conversion("trl", **best, **keys).to_accept() == refused
    assert conversion("trl", **keys).to_accept() == []


def test_early_stopping_of_llama_factory_counts_evaluations():
    keys = {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 20, "early_stopping_steps": 3}
    spec = convert("llama-factory", **keys).training
    assert (spec.stop_after, spec.eval_every) == (3, 20)
