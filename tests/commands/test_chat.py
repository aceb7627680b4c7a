"""`lora chat` with a pipe on stdin: three adapters on one base, each answering in its own way."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe

WAYS = {"capitals": "Paris is the capital.", "sums": "The answer is forty two.", "lines": "line two"}
ASKED = ["What is the capital of France?", "How are you?", "Who jumps?"]


@pytest.fixture
def three(recipe: WriteRecipe, lora: Lora) -> None:
    """Adapters that have learnt to answer anything with one sentence each."""
    for name, said in WAYS.items():
        rows = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}
            for question in ASKED
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe(
            {
                "data.train": f"{name}.jsonl",
                "data.eval": None,
                "training": {"max_steps": 60, "learning_rate": 2e-2, "save_every": 60, "eval_every": None},
                "output": f"runs/{name}",
            }
        )
        done = lora("train", "recipe.yaml")
        assert done.code == 0, done.err


def test_three_adapters_on_one_base(three: None, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    lines = [
        ASKED[0],
        "/use sums",
        ASKED[0],
        "/use lines",
        ASKED[1],
        "/compare",
        "/save said.json",
        "/reset",
        "/base",
        ASKED[0],
        "/use nobody",
        "/what",
        "/quit",
        "not heard",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    more = ["--adapter", "sums=runs/sums/adapter", "--adapter", "lines=runs/lines/adapter"]
    done = lora("chat", "runs/capitals", *more, "--max-new-tokens", "20")
    assert done.code == 0, done.err
    heard = done.out.splitlines()
    assert heard[:3] == [WAYS["capitals"], WAYS["sums"], WAYS["lines"]]
    assert f"[lines] {WAYS['lines']}" in heard
    assert re.search(r"^\[base\] ", done.out, re.MULTILINE)
    assert heard[-1] not in WAYS.values(), "the base knows none of them"
    switched = [int(number) for number in re.findall(r"switched in (\d+) ms", done.err)]
    assert len(switched) == 3
    assert max(switched) < 50
    assert "there is no adapter 'nobody'; known are base, adapter, sums, lines" in done.err
    assert "/what is not a command" in done.err
    saved = json.loads(Path("said.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 3
    assert saved[-1]["content"] == WAYS["lines"]


def test_a_merged_model_and_a_base_alone(three: None, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    assert lora("merge", "runs/sums/adapter", "--out", "merged").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED[0]}\n"))
    done = lora("chat", "merged", "--max-new-tokens", "20")
    assert (done.code, done.out) == (0, WAYS["sums"] + "\n"), done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"],
         ["error: nothing is not a run, adapter or model", "hint: give a folder of lora train or lora merge"]),
        (["runs/a", "--adapter", "base=runs/a/adapter"],
         ["error: --adapter base=runs/a/adapter: the name base is taken", "hint: give another: --adapter NAME=DIR"]),
        (["base", "--adapter", "runs/a/adapter"],
         ["error: --adapter needs an adapter or a run as target", "hint: name one of the adapters first"]),
    ],
)  # fmt: skip
def test_mistakes_are_two_lines(words: list[str], said: list[str], trained: Path, lora: Lora):
    done = lora("chat", *words)
    assert (done.code, done.out) == (2, "")
    assert done.last_two == said
