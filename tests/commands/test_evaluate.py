"""`lora eval` as a user types it: on a recipe, a run, an adapter, and several of them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe, rows, write_recipe


def table(out: str) -> dict[str, list[str]]:
    """Name → the figures as shown: loss, perplexity, accuracy, tokens."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 5 and re.fullmatch(r"\d+\.\d{4}", line[1])}


def test_a_run_shows_base_and_adapter(trained: Path, lora: Lora):
    done = lora("eval", "runs/a")
    assert done.code == 0, done.err
    assert list(table(done.out)) == ["base", "adapter"]
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    evals = [f"{r['eval_loss']:.4f}" for r in records if "eval_loss" in r]
    # The same rows and the same numbers as during training.
    assert [figures[0] for figures in table(done.out).values()] == [evals[0], evals[-1]]
    assert all(line.startswith(("rows.jsonl", "measuring ")) for line in done.err.splitlines()), done.err


def test_recipe_and_adapter_name_the_same(trained: Path, lora: Lora):
    by_run = lora("eval", "runs/a").out
    assert lora("eval", "recipe.yaml").out == by_run
    assert lora("eval", "runs/a/adapter").out == by_run


def test_a_recipe_before_its_run_measures_the_base(recipe: WriteRecipe, lora: Lora):
    assert list(table(lora("eval", recipe()).out)) == ["base"]


def test_a_moved_run_is_still_one(trained: Path, lora: Lora):
    before = lora("eval", trained).out
    shutil.move("runs/a", "kept")
    shutil.rmtree("runs")
    assert lora("eval", "kept").out == before


def test_several_adapters_data_and_json(trained: Path, lora: Lora):
    shutil.copytree("runs/a", "runs/b")
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    words = [
        "--adapter",
        "twin=runs/b/adapter",
        "--adapter",
        "runs/b/adapter",
        "--data",
        "other.jsonl",
        "--json",
        "f.json",
    ]
    done = lora("eval", "runs/a", *words)
    assert done.code == 0, done.err
    shown = table(done.out)
    assert list(shown) == ["base", "adapter", "twin", "b"]
    assert shown["adapter"] == shown["twin"] == shown["b"] != shown["base"]
    report = json.loads(Path("f.json").read_text())
    assert report["rows"] == 3
    assert list(report["results"]) == list(shown)
    assert f"{report['results']['twin']['loss']:.4f}" == shown["twin"][0]
    assert report["results"]["base"].keys() == {"loss", "perplexity", "accuracy", "tokens"}


def test_answers_side_by_side(trained: Path, lora: Lora):
    out = lora("eval", "runs/a", "--answers", "2").out
    assert len(re.findall(r"^--- rows\.jsonl:\d+$", out, re.MULTILINE)) == 2
    for who in ("reference", "base", "adapter"):
        assert len(re.findall(rf"^\[{who}\]", out, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["nothing"], "nothing is no recipe, run or adapter folder", "give a YAML file, or a folder of lora train"),
        (
            ["runs/a", "--adapter", "x=runs"],
            "--adapter x=runs: runs has no adapter_config.json",
            "give an adapter folder",
        ),
        (
            ["runs/a", "--adapter", "base=runs/a/adapter"],
            "--adapter base=runs/a/adapter: the name base is taken",
            "give another: --adapter NAME=DIR",
        ),
        (
            ["runs/a", "--json", "no/where.json"],
            "--json no/where.json: there is no folder no",
            "make it first",
        ),
        (
            ["far/alone"],
            "far/alone: no recipe.yaml beside this adapter says what base and rows it had",
            "write a recipe with its model and data, and run lora eval RECIPE --adapter DIR",
        ),
        (
            ["recipe.yaml", "--data", "no.jsonl"],
            "no.jsonl",
            "",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured(words: list[str], error: str, hint: str, trained: Path, lora: Lora):
    shutil.copytree("runs/a/adapter", "far/alone")
    done = lora("eval", *words)
    assert (done.code, done.out) == (2, "")
    if hint:
        assert done.last_two == [f"error: {error}", f"hint: {hint}"]
    else:
        assert error in done.last_two[0]


def test_nothing_held_out(trained: Path, lora: Lora):
    write_recipe(Path("recipe.yaml"), {"data.eval": None})
    done = lora("eval", "recipe.yaml")
    assert done.code == 2
    assert done.last_two == [
        "error: recipe.yaml: its recipe holds no rows out (data.eval is null)",
        "hint: name rows with --data FILE",
    ]


def test_an_adapter_of_another_base(trained: Path, lora: Lora):
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    config["r"] = 2  # shapes that the tensors do not have
    Path("runs/a/adapter/adapter_config.json").write_text(json.dumps(config))
    done = lora("eval", "runs/a")
    assert (done.code, done.out) == (2, "")
    assert done.last_two[0].startswith("error: runs/a/adapter: does not fit the base model: ")
    assert "\n" not in done.last_two[0]
