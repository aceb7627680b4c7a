"""The rule by which the output on a page is compared: stale text is found, other figures are not."""

from pathlib import Path

import pytest

from tests.docs.blocks import Command, read_commands
from tests.docs.lora_words import lora_calls, unknown_words
from tests.docs.output import first_difference, matches
from tests.docs.shell import Program, Ran, read_line, run_line

PRINTED = (
    "2,000 rows read = 1,966 for train + 34 held out\nmemory: 93 KiB of bfloat16\neval loss 2.44 -> 0.87 (-64.4%)\n"
)


@pytest.mark.parametrize(
    "shown",
    [
        PRINTED,
        "10 rows read = 9 for train + 1 held out\nmemory: 1.5 GiB of float32\neval loss 11 -> 1.2e-05 (-3%)",
        "2,000 rows read = 1,966 for train + 34 held out memory:\n  93 KiB of bfloat16\n...",
        "...\neval loss 2.44 -> 0.87 (-64.4%)",
        "2,000 rows read = ...\neval loss 2.44 ...",
        "...",
    ],
)
def test_figures_gaps_and_skipped_text_may_differ(shown: str):
    assert matches(shown, PRINTED)


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ("2,000 rows read = 1,966 for train + 34 held out", "more is printed after the last line"),
        ("2,000 rows read = 1,966 for eval + 34 held out\n...", "is not printed: 2,000 rows"),
        ("...\neval loss 2.44 -> best (-64.4%)", "is not printed: eval loss"),
        ("memory: 93 KiB of bfloat16\n...", "is not printed: memory"),
        ("...\nmemory: 93 of bfloat16\n...", "is not printed: memory"),
    ],
)
def test_stale_text_is_found(shown: str, told: str):
    assert not matches(shown, PRINTED)
    assert first_difference(shown, PRINTED).startswith(told)


def test_commands_are_read_with_continuations_and_their_output():
    text = "$ lora check a.yaml \\\n    --rows 1\nfirst\n\nsecond\n$ lora methods\n"
    assert list(read_commands(text)) == [
        Command("lora check a.yaml --rows 1", "first\n\nsecond"),
        Command("lora methods", ""),
    ]


def test_unknown_words_of_lora_commands_are_found():
    text = (
        "lora train a.yaml --resume  # --this\nX=1 python -m lora_cli adapter inspect \\\n  a --plto b | lora chta c\n"
    )
    calls = list(lora_calls(text))
    assert calls == [["train", "a.yaml", "--resume"], ["adapter", "inspect", "a", "--plto", "b"], ["chta", "c"]]
    assert [unknown_words(words) for words in calls] == [[], ["--plto"], ["chta"]]
    assert unknown_words(["COMMAND", "--help"]) == []
    assert unknown_words(["--no-such-option"]) == ["--no-such-option"]


def test_a_line_is_split_into_programs():
    line = "echo 'a | b' | lora check - < in.yaml | head -n 2 > out.txt  # why"
    assert read_line(line, {}) == [
        Program(["echo", "a | b"], None, None),
        Program(["lora", "check", "-"], "in.yaml", None),
        Program(["head", "-n", "2"], None, "out.txt"),
    ]
    assert read_line('cat "$name"', {"name": "a b"}) == [Program(["cat", "a b"], None, None)]


@pytest.mark.parametrize(
    "line", ["pip install x", "lora check a; rm b", "lora check a && lora train a", "x=1 lora check"]
)
def test_a_line_that_pages_may_not_have_is_an_error(line: str):
    with pytest.raises(ValueError, match="fence it as bash"):
        read_line(line, {})


def test_lines_run_with_pipes_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work, logs, variables = tmp_path / "work", tmp_path / "logs", dict[str, str]()
    work.mkdir()
    logs.mkdir()
    monkeypatch.chdir(work)
    assert run_line("lora methods | grep -c recipe | wc -l", logs, variables) == Ran(0, "1\n")
    assert run_line("name=$(echo one two)", logs, variables) == Ran(0, "")
    assert run_line('echo "$name" > "$name"', logs, variables) == Ran(0, "")
    assert run_line("cat < 'one two'", logs, variables) == Ran(0, "one two\n")
    failed = run_line("lora init no-such-recipe", logs, variables)
    assert failed.code == 2
    assert failed.output.startswith("error: there is no recipe")
