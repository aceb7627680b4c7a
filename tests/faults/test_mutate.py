"""Tests of the mutations that the fault tests use: the same seed gives the same value, and it is another value."""

import json

import pytest

from tests.faults import mutate

DATA = bytes(range(256)) * 8
TREE = {"a": [1, 2.5, {"b": "text"}], "c": {"d": None, "e": True}}


@pytest.mark.parametrize("name", mutate.BYTES)
def test_mutations_of_bytes_are_reproducible_and_change_them(name: str):
    kinds = {name: mutate.BYTES[name]}
    for data in (DATA, b"x", b"xy"):
        values = [mutate.mutate_bytes(data, seed, kinds=kinds).value for seed in range(20)]
        assert values == [mutate.mutate_bytes(data, seed, kinds=kinds).value for seed in range(20)]
        assert data not in values
    mutate.mutate_bytes(b"", 0, kinds=kinds)


@pytest.mark.parametrize("name", mutate.TREES)
def test_mutations_of_trees_are_reproducible_and_leave_the_original(name: str):
    before = json.dumps(TREE)
    for seed in range(50):
        mutation = mutate.mutate_json(TREE, seed, kinds={name: mutate.TREES[name]})
        again = mutate.mutate_json(TREE, seed, kinds={name: mutate.TREES[name]})
        assert mutate.dump_json(mutation.value) == mutate.dump_json(again.value)
    assert json.dumps(TREE) == before
    mutate.mutate_json("text", 0, kinds={name: mutate.TREES[name]})


@pytest.mark.parametrize("name", mutate.TEXTS)
def test_mutations_of_texts_are_reproducible(name: str):
    text = "a: 1\nb: 2\nc: three\n"
    values = [mutate.mutate_text(text, seed, kinds={name: mutate.TEXTS[name]}).value for seed in range(20)]
    assert values == [mutate.mutate_text(text, seed, kinds={name: mutate.TEXTS[name]}).value for seed in range(20)]
    assert len(set(values)) > 1
    mutate.mutate_text("", 0, kinds={name: mutate.TEXTS[name]})
