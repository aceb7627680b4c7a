"""`lora chat` with input from a pipe: switching between three adapters on one base, each with its own answer."""

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe, remove_checksums

ANSWERS = {"capitals": "Paris is the capital.", "sums": "The answer is forty two.", "lines": "line two"}
QUESTIONS = ["What is the capital of France?", "How are you?", "Who jumps?"]


@pytest.fixture
def three_adapters(recipe: WriteRecipe, lora: Lora) -> None:
    """Train three adapters; each answers every question with the same sentence."""
    for name, answer in ANSWERS.items():
        rows = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question in QUESTIONS
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
        result = lora("train", "recipe.yaml")
        assert result.code == 0, result.err


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_controls_no_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.commands.chat import CollectingStreamer
    from tests.inputs.tiny_tokenizers import CHATML, build

    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    streamer = CollectingStreamer(build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML))
    streamer.on_finalized_text("a\x1b[2Jb")
    assert screen.getvalue() == (r"a\x1b[2Jb" if terminal else "a\x1b[2Jb"), "a pipe has the answer as it is"
    assert streamer.parts == ["a\x1b[2Jb"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.commands.chat import CollectingStreamer

    write = CollectingStreamer.on_finalized_text

    def write_and_interrupt(streamer: CollectingStreamer, text: str, stream_end: bool = False) -> None:
        write(streamer, text, stream_end)
        if len(streamer.parts) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CollectingStreamer, "on_finalized_text", write_and_interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/help\n"))
    result = lora("chat", trained_run, "--max-new-tokens", "100000")
    assert result.code == 0
    assert result.err.splitlines()[1] == "(stopped)"
    assert "/quit" in result.err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in the C locale
def test_input_that_is_not_text_is_refused(errors: str, trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello \xff\n"), encoding="utf-8", errors=errors))
    result = lora("chat", trained_run)
    assert result.code == 2
    assert result.last_two == [
        "error: standard input is not utf-8 text: byte 0xff",
        "hint: convert it to UTF-8; PYTHONIOENCODING=utf-8 reads UTF-8 whatever the locale is",
    ]


@pytest.mark.slow
def test_use_base_and_compare_switch_between_adapters(
    three_adapters: None, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    lines = [
        QUESTIONS[0],
        "/use sums",
        QUESTIONS[0],
        "/use lines",
        QUESTIONS[1],
        "/compare",
        "/save chat.json",
        "/reset",
        "/base",
        QUESTIONS[0],
        "/use nobody",
        "/what",
        "/quit",
        "after /quit",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    more = ["--adapter", "sums=runs/sums/adapter", "--adapter", "lines=runs/lines/adapter"]
    result = lora("chat", "runs/capitals", *more, "--max-new-tokens", "20")
    assert result.code == 0, result.err
    printed = result.out.splitlines()
    assert printed[:3] == [ANSWERS["capitals"], ANSWERS["sums"], ANSWERS["lines"]]
    assert f"[lines] {ANSWERS['lines']}" in printed
    assert re.search(r"^\[base\] ", result.out, re.MULTILINE)
    assert printed[-1] not in ANSWERS.values(), "the base has learned none of the answers"
    switch_times = [int(number) for number in re.findall(r"switched in (\d+) ms", result.err)]
    assert len(switch_times) == 3
    assert min(switch_times) < 50  # not the largest: another program may run at the same time
    assert "there is no adapter 'nobody'; available: base, adapter, sums, lines" in result.err
    assert "/what is not a command" in result.err
    saved = json.loads(Path("chat.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 3
    assert saved[-1]["content"] == ANSWERS["lines"]


def test_a_conversation_that_the_template_rejects_does_not_end_the_chat(
    trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (remove_checksums(trained_run / "adapter") / "chat_template.jinja").write_text(
        template + "{{ m.content }}{% endfor %}"
    )
    lines = ["/system Be short.", QUESTIONS[0], "/system", QUESTIONS[0], "/save chat.json"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    result = lora("chat", trained_run, "--max-new-tokens", "2")
    assert result.code == 0, result.err
    assert "the chat template rejects this conversation: no system role; change it with /system or /reset" in result.err
    saved = json.loads(Path("chat.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]


@pytest.mark.slow
def test_a_merged_model_is_a_chat_target(three_adapters: None, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    assert lora("merge", "runs/sums/adapter", "--out", "merged").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTIONS[0]}\n"))
    result = lora("chat", "merged", "--max-new-tokens", "20")
    assert (result.code, result.out) == (0, ANSWERS["sums"] + "\n"), result.err


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["runs/a", "--system", "\udcff"],
         ["error: --system has bytes that are not text", "hint: write it in UTF-8"]),
        (["nothing"],
         ["error: nothing does not exist", "hint: give a run of lora train, an adapter folder or a model"]),
        (["runs/a", "--adapter", "base=runs/a/adapter"],
         ["error: --adapter base=runs/a/adapter: the name base is taken", "hint: give another: --adapter NAME=DIR"]),
        (["base", "--adapter", "runs/a/adapter"],
         ["error: --adapter needs an adapter or a run as target", "hint: write one of the adapters as the target"]),
    ],
)  # fmt: skip
def test_wrong_arguments_give_an_error_and_a_hint(
    arguments: list[str], lines: list[str], trained_run: Path, lora: Lora
):
    result = lora("chat", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.last_two == lines


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\\\ntwo\\\n\\\nthree\nfour\n", ["one\ntwo\n\nthree", "four"]),
        ("one \\\r\n two\r\n\nfour", ["one \n two", "four"]),
        ("one\\ two\nthe end\\\n", ["one\\ two", "the end"]),
    ],
)
def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(
    typed: str, messages: list[str], trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed}\n/save chat.json"))
    result = lora("chat", trained_run, "--max-new-tokens", "1")
    assert result.code == 0, result.err
    saved = json.loads(Path("chat.json").read_text())["messages"]
    assert [message["content"] for message in saved if message["role"] == "user"] == messages
