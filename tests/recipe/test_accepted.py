"""Valid recipes: values of YAML scalars, `--set` overrides, defaults, and the round trip of a resolved recipe."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError
from lora_cli.recipe.dump import dump_recipe, recipe_schema
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.rules import find_conflicts
from lora_cli.recipe.schema import AdapterSpec, Recipe, SourceSpec
from lora_cli.recipe.suggest import all_keys
from lora_cli.recipe.yaml_scalars import parse_scalar

GOOD = "model: {path: org/model}\ndata: {train: rows.jsonl}\n"

# Every example overwrites the file of the function-scoped fixture, which is intended.
RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1e+4", 1e4), ("1E5", 1e5), ("1.5e3", 1500.0), ("5.", 5.0), (".5", 0.5), ("-3", -3)],
        *[("0", 0), ("-0.0", -0.0), ("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[(word, word) for word in ("no", "off", "Yes", "on", "y", "n", "none", "None", "nan", "inf")],
        *[(word, word) for word in ("010", "0x1F", "0o17", "0b1", "1_000", "1:30", "2024-01-01", "1e", "1.0.0")],
        *[(word, word) for word in ("٣", "1٣", "１", "+", "-", ".", "e5", "1 000", "00", "01.5", "=", "<<")],
        (".inf", math.inf),
    ],
)
def test_unquoted_scalars(text: str, value: object):
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_defaults_of_the_smallest_recipe(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.training.epochs == 1
    assert recipe.quantization is None
    assert recipe.data.packing is None  # the base decides
    packed, padded = recipe.with_packing(True), recipe.with_packing(False)
    assert (packed.training.tokens_per_batch, packed.training.batch_size) == (recipe.data.max_length, None)
    assert (padded.training.tokens_per_batch, padded.training.batch_size) == (None, 4)
    for written in (packed, padded):
        assert load_recipe(write(dump_recipe(written))) == written


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training: {learning_rate: 1e-4}", "training.learning_rate", 1e-4),
        ("training: {max_steps: 1e3}", "training.max_steps", 1000),
        ("training: {gradient_checkpointing: off}", "training.gradient_checkpointing", False),
        ("training: {max_grad_norm: null}", "training.max_grad_norm", None),
        ("training: {warmup: 100}", "training.warmup", 100.0),
        ("adapter: {target_modules: '.*mlp.(up|down)_proj'}", "adapter.target_modules", ".*mlp.(up|down)_proj"),
        ("adapter: {target_modules: [q_proj, self_attn.v_proj]}", "adapter.target_modules.1", "self_attn.v_proj"),
        ("quantization: {}", "quantization.double_quant", True),
        ("quantization: {bits: 8}", "quantization.type", None),
        ("quantization: null", "quantization", None),
        ("output: 'on'", "output", "on"),
        ("output: 010", "output", "010"),
        ("output: &o a\ntask: causal-lm # *o", "output", "a"),
        ("training: &t {seed: 1}\n# done\n...", "training.seed", 1),
    ],
)
def test_values_are_parsed(text: str, key: str, value: object, write):
    loaded: object = load_recipe(write(GOOD + text))
    for step in key.split("."):
        loaded = loaded[int(step)] if isinstance(loaded, list) else getattr(loaded, step)
    assert loaded == value


def test_bom_and_crlf_are_accepted(write):
    assert load_recipe(write("\ufeff" + GOOD.replace("\n", "\r\n"))) == load_recipe(write(GOOD))


def test_set_overrides_values_of_the_file(write):
    path = write("model: {path: org/model}\ndata: {train: rows.jsonl}\ntraining: {learning_rate: no}\n")
    recipe = load_recipe(path, ["training.learning_rate=1e-4", "adapter.target_modules=[q_proj]", "data.eval=null"])
    assert recipe.training.learning_rate == 1e-4
    assert recipe.adapter.target_modules == ["q_proj"]
    assert recipe.data.eval is None


def test_set_adds_missing_keys(write):
    recipe = load_recipe(write("output: x\n"), ["model.path=a=b", "data={train: rows.jsonl}", "data.max_length=8"])
    assert recipe.model.path == "a=b"
    assert recipe.data.max_length == 8


def test_set_changes_one_of_two_aliased_sections(write):
    sources = "data: {train: [&a {path: a.jsonl, columns: &c {text: t}}], columns: *c}\n"
    recipe = load_recipe(write("model: {path: m}\n" + sources), ["data.columns.text=u"])
    assert recipe.data.columns == {"text": "u"}
    assert recipe.data.train[0].columns == {"text": "t"}  # type: ignore[union-attr]


def test_set_drops_the_problems_of_its_key(write):
    path = write(GOOD + "adapter: {rank: !!int 3, alpha: x}\ntraining: {seed: 1, seed: 2}\n")
    load_recipe(path, ["adapter.rank=4", "adapter.alpha=8", "training.seed=3"])


# Strings that YAML or a reader may take for another type.
AMBIGUOUS = (
    "no",
    "1e5",
    "010",
    "1:30",
    "null",
    "~",
    "true",
    "0x1F",
    "1_000",
    "2024-01-01",
    "- a",
    "a: b",
    "#",
    "1.",
    ".5",
)
TEXT = st.sampled_from(AMBIGUOUS) | st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0"), min_size=1
)
PRINTABLE = st.sampled_from(AMBIGUOUS) | st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1
)
NUMBER = st.floats(min_value=1e-12, max_value=1, exclude_max=True)
SOURCE = st.fixed_dictionaries(
    {"path": TEXT},
    optional={"split": TEXT, "weight": NUMBER, "columns": st.dictionaries(TEXT, TEXT, max_size=3)},
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    packing = draw(st.booleans())
    length = draw(st.integers(1, 10**6))
    training = {
        draw(st.sampled_from(["epochs", "max_steps"])): draw(st.integers(100, 10**9)),
        "learning_rate": draw(NUMBER),
        "warmup": draw(NUMBER | st.just(7.0)),
        "max_grad_norm": draw(NUMBER | st.none()),
        "eval_every": draw(st.none() | st.integers(1, 10**12)),
        "gradient_checkpointing": draw(st.sampled_from(["auto", True, False])),
    }
    if draw(st.booleans()):
        training |= {"tokens_per_batch": length + 5} if packing else {"batch_size": 3}
    data = {
        "train": draw(TEXT | st.lists(SOURCE, min_size=1, max_size=3)),
        "eval": draw(st.none() | NUMBER.filter(bool) | TEXT),
        "columns": draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        "chat_template": draw(st.none() | TEXT),
        "packing": packing,
        "max_length": length,
    }
    method = draw(st.sampled_from(list(METHOD_FACTS)))
    adapter = {
        "alpha": draw(NUMBER),
        "target_modules": draw(st.lists(TEXT, min_size=1) | TEXT),
        "layers": draw(st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True)),
        "rank_pattern": draw(st.none() | st.dictionaries(TEXT, st.integers(1, 99), min_size=1, max_size=2)),
        "virtual_tokens": draw(st.integers(1, 99)),
        "init_text": draw(st.none() | TEXT),
    }
    values = {
        "model": {"path": draw(PRINTABLE), "revision": draw(st.none() | TEXT)},
        "adapter": {
            "method": method,
            **{key: value for key, value in adapter.items() if key in METHOD_FACTS[method].options},
        },
        "data": data,
        "training": training,
        "output": draw(TEXT),
    }
    if draw(st.booleans()):
        values["quantization"] = draw(st.sampled_from([{}, {"bits": 8}, {"type": "fp4", "double_quant": False}]))
    if draw(st.booleans()):
        values["generation"] = draw(st.sampled_from([{"num_beams": 4}, {"num_beams": 2, "length_penalty": 0.8}]))
    return Recipe.model_validate(values)


@pytest.mark.slow
@RELAXED
@given(recipe=recipes())
def test_a_resolved_recipe_loads_as_itself(recipe: Recipe, write):
    assume(not list(find_conflicts(recipe)))  # for example, `output` may be drawn equal to the model path
    loaded = load_recipe(write(dump_recipe(recipe)))
    assert loaded == recipe
    assert dump_recipe(loaded) == dump_recipe(recipe)


@pytest.mark.parametrize("method", METHOD_FACTS)
def test_method_options_default_to_those_of_the_method(method: str, write):
    facts = METHOD_FACTS[method]
    quantization = f"quantization: {{bits: {facts.needs_bits}}}\n" if facts.needs_bits else ""
    recipe = load_recipe(write(f"{GOOD}adapter: {{method: {method}}}\n{quantization}"))
    options = {name: getattr(recipe.adapter, name) for name in AdapterSpec.model_fields if name != "method"}
    assert options == dict.fromkeys(options) | facts.options
    assert recipe.data.packing is (None if facts.supports_packing else False)  # None: the base decides
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_a_resolved_recipe_shows_every_key(write):
    text = dump_recipe(load_recipe(write(GOOD)))
    assert load_recipe(write(text)) == load_recipe(write(GOOD))
    for line in ("learning_rate: 0.0002", "revision: null", "packing: null", "quantization: null"):
        assert line in text


FRAGMENTS = st.sampled_from(
    (
        *"[]{}:,-?&*!|>'\"%@`#\n\t ~\\",
        *("\n  ", ": ", "- ", "&a", "*a", "!!str", "<<: ", "---", "---\n", "%YAML 1.1\n", "\\U0011"),
        *("model", "path", "data", "train", "eval", "columns", "training", "adapter", "quantization", "bits"),
        *("1e-4", ".nan", "0x", "null", "{path: m}", "output: ", "\r\n", "\u2028", "\ufeff", "[0]", ".", "="),
    )
)


def error_details(path: Path, overrides: list[str]) -> Sequence[str]:
    try:
        load_recipe(path, overrides)
    except LoraError as error:
        return error.details
    return ()


@settings(RELAXED, max_examples=300)
@given(
    text=st.lists(FRAGMENTS, max_size=30).map("".join) | st.text() | st.binary(),
    good=st.booleans(),
    sets=st.lists(st.lists(FRAGMENTS, max_size=6).map("".join), max_size=2),
)
def test_any_text_loads_or_raises_a_lora_error(text: str | bytes, good: bool, sets: list[str], write):
    raw = text if isinstance(text, bytes) else text.encode(errors="replace")
    assert all(line.isprintable() for line in error_details(write(GOOD.encode() * good + raw), sets))


VALUES_OF_EVERY_TYPE = ("[lora]", "{a: 1}", "{1: [2]}", "[[1]]", "[{a: b}]", "[]", "{}", "null", "true", "-1", "''")


@pytest.mark.parametrize("key", all_keys(recipe_schema()))
def test_a_value_of_any_type_loads_or_raises_a_lora_error(key: str, write):
    path = write(GOOD)
    for value in VALUES_OF_EVERY_TYPE:
        assert all(line.isprintable() for line in error_details(path, [f"{key}={value}"]))


@pytest.mark.parametrize("field", SourceSpec.model_fields)
def test_a_source_field_of_any_type_loads_or_raises_a_lora_error(field: str, write):
    path = write(GOOD)
    for value in VALUES_OF_EVERY_TYPE:
        error_details(path, ["data.train={path: rows.jsonl}", f"data.train.{field}={value}"])


def test_schema_describes_every_field():
    schema = recipe_schema()
    json.dumps(schema, allow_nan=False)
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            # A key that is a section is described by the docstring of the section.
            assert "$ref" in field or field.get("description"), name
