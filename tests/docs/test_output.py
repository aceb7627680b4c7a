"""The rule by which the output on a page is compared: stale text is found, other figures are not."""

import pytest

from tests.docs.blocks import Command, read_commands
from tests.docs.lora_words import lora_calls, unknown_words
from tests.docs.output import first_difference, matches

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
