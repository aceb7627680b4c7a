"""A recipe on stdin: `lora check -` and `lora train -`, also with several processes and restarts."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from lora_cli.run import standard_input
from tests.commands.conftest import Lora, WriteRecipe


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts text on stdin."""

    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def test_problems_are_those_of_stdin_with_their_lines(pipe, lora: Lora):
    pipe(b"model:\n  pth: x\ndata: {train: rows.jsonl}\n")
    result = lora("check", "-")
    assert result.code == 2
    assert result.err.splitlines()[0].startswith("<stdin>:2: model.pth: unknown key")
    assert result.last_two[-1].startswith("error: 1 problem in <stdin>")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "<stdin>:1: the recipe is empty"),
        (b"model: \xff\n", "<stdin>:1: byte 0xff is not UTF-8"),
        (b"#" * 300_000, "error: <stdin> has more than 262,144 bytes"),
    ],
)
def test_what_is_no_recipe_is_refused(data: bytes, message: str, pipe, lora: Lora):
    pipe(data)
    result = lora("check", "-")
    assert result.code == 2
    assert result.err.startswith(message)


def test_settings_and_paths_work_as_with_a_file(pipe, recipe: WriteRecipe, lora: Lora):
    pipe(recipe().read_bytes())
    result = lora("check", "-", "--no-model", "--set", "training.seed=1")
    assert result.code == 0, result.err
    assert result.out.startswith("rows.jsonl: 24 rows")


def test_processes_of_torchrun_cannot_share_it(pipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    pipe(b"model: {path: x}\n")
    result = lora("train", "-")
    assert result.err.splitlines() == [
        "error: -: processes that another program than lora starts cannot share one stdin",
        "hint: write the recipe to a file that all of them can read",
    ]


def test_a_worker_reads_exactly_the_text_of_its_launcher(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    before = os.dup(0)
    os.dup2(read, 0)
    try:
        os.write(write, b"model: {}and what follows")
        monkeypatch.setenv(standard_input.BYTES, "9")
        standard_input.receive_stdin()
        assert standard_input.read_stdin(limit=100) == b"model: {}"
        assert os.read(0, 100) == b"and what follows"
        assert standard_input.BYTES not in os.environ
    finally:
        os.dup2(before, 0)
        for descriptor in (read, write, before):
            os.close(descriptor)
        standard_input.forget_stdin()


@pytest.mark.slow
def test_a_worker_trains_what_is_piped_the_run_can_be_resumed_and_there_is_one_document(
    recipe: WriteRecipe, lora: Lora, pipe
):
    """With --max-restarts, training is in a process of its own, which gets the text from this one."""
    text = recipe({"training.max_steps": 2, "training.save_every": 1, "training.eval_every": None}).read_bytes()
    Path("recipe.yaml").unlink()
    pipe(text)
    done = lora("train", "-", "--max-restarts", "1", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["finished"], summary["steps_done"]) == (True, 2)
    assert "runs/a/adapter" in done.err.splitlines(), "the result of the worker, whose stdout is not the document's"
    assert yaml.safe_load(Path("runs/a/recipe.yaml").read_text())["training"]["max_steps"] == 2
    pipe(text)
    resumed = lora("train", "-", "--resume", "--set", "training.save_every=2")
    assert resumed.code == 0, resumed.err
