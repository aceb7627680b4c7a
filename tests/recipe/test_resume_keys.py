"""Every recipe key has an effect on a resumed run, and every changed value is found."""

import json
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from lora_cli.recipe.resume_keys import RESUME_EFFECTS, Change, Effect, effect_of, find_changes
from lora_cli.recipe.schema import Recipe, SourceSpec

SMALLEST = {"model": {"path": "org/model"}, "data": {"train": "rows.jsonl"}}


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted keys of a section: for a section in it that may be null or a single value, its own key too."""
    keys = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = sections_in(field.annotation)
        if not inner or field.annotation not in inner:
            keys.append(key)
        keys += [each for part in inner for each in keys_of(part, f"{key}.")]
    return keys


def recipe(**changes: Any) -> Recipe:
    tree: dict[str, Any] = json.loads(json.dumps(SMALLEST))
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return Recipe.model_validate(tree)


def saved(loaded: Recipe, *, without: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe as a checkpoint records it, without some keys of its sections."""
    tree: dict[str, Any] = json.loads(json.dumps(loaded.model_dump(mode="json")))
    for key in without:
        section, _, name = key.partition(".")
        del tree[section][name]
    return Recipe.model_validate(tree)


def test_every_key_of_the_schema_has_an_effect_and_no_other_key():
    assert sorted(RESUME_EFFECTS) == sorted(keys_of(Recipe))
    assert set(RESUME_EFFECTS.values()) == set(get_args(Effect))
    assert "quantization.bits" in RESUME_EFFECTS
    assert "data.eval.weight" in RESUME_EFFECTS


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantization__bits": 4}, {"data__train": [{"path": "a.jsonl", "columns": {"prompt": "q"}}, {"path": "b"}]}],
)
def test_an_unchanged_recipe_has_no_changes(changes: dict[str, Any]):
    assert find_changes(saved(recipe(**changes)), recipe(**changes)) == []


def test_changes_are_in_the_order_of_the_table_with_their_effects():
    before = recipe(training__learning_rate=2e-4)
    after = recipe(
        training__learning_rate=1e-4, training__save_every=50, adapter__rank=8, output="runs/b", task="seq-cls"
    )
    changes = find_changes(saved(before), after)
    assert [
        (c.line(), c.effect) for c in changes if not c.key.startswith("data.") and c.key != "training.batch_size"
    ] == [
        ("task: causal-lm -> seq-cls", "learned"),
        ("adapter.rank: 16 -> 8", "learned"),
        ("training.learning_rate: 0.0002 -> 0.0001", "rates"),
        ("training.save_every: 100 -> 50", "none"),
        ("output: runs/lora -> runs/b", "place"),
    ]


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("a.jsonl", "b.jsonl", ["data.train: a.jsonl -> b.jsonl"]),
        ("a.jsonl", [{"path": "a.jsonl"}], []),
        ("a.jsonl", [{"path": "a.jsonl", "weight": 2.0}], ["data.train[0].weight: 1.0 -> 2.0"]),
        (
            [{"path": "a.jsonl"}, {"path": "b.jsonl", "format": "text"}],
            [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
            ["data.train[1].format: text -> null"],
        ),
    ],
)
def test_sources_are_compared_key_by_key(before: Any, after: Any, lines: list[str]):
    changes = find_changes(saved(recipe(data__train=before)), recipe(data__train=after))
    assert [change.line() for change in changes] == lines


def test_a_section_that_one_recipe_leaves_out_is_a_change_of_its_keys():
    changes = find_changes(saved(recipe()), recipe(quantization__bits=8))
    assert ("quantization.bits: null -> 8", "learned") in [(c.line(), c.effect) for c in changes]
    changes = find_changes(saved(recipe(quantization__bits=8)), recipe())
    assert ("quantization.bits: 8 -> null", "learned") in [(c.line(), c.effect) for c in changes]


def test_a_key_that_an_earlier_version_did_not_have_had_its_default():
    before = saved(recipe(), without=("training.weight_decay", "training.log_every", "adapter.from"))
    assert find_changes(before, recipe()) == []
    changed = find_changes(before, recipe(training__weight_decay=0.5, training__log_every=7))
    assert changed == [
        Change("training.weight_decay", 0.0, 0.5, "learned"),
        Change("training.log_every", 1, 7, "none"),
    ]


def test_long_values_are_shortened():
    change = Change("data.columns", {}, {"prompt": "x" * 999}, "data")
    assert len(change.line()) < 250
    assert change.line().endswith("…")


def test_the_effect_of_a_source_does_not_depend_on_its_index():
    assert effect_of("data.train[17].path") == effect_of("data.train.path") == "data"
    assert {f"data.train.{key}" for key in SourceSpec.model_fields} <= RESUME_EFFECTS.keys()
