"""Every bad file is refused with its exact lines; where skipping is asked for, it is left out and counted."""

import pytest

from lora_cli.data.examples import check_rows
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.bad_data import BAD, Bad

USUAL = "hint: mend them, or set data.on_bad_row: skip to leave them out, counted"


def shown(error: LoraError) -> list[str]:
    lines = [*error.details, f"error: {error.message}", f"hint: {error.hint}"]
    return lines[:-2] if lines[-1] == USUAL else lines


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_is_refused_with_its_lines(prepared, chatml, bad: Bad):
    with pytest.raises(LoraError) as caught:
        prepared(chatml, files={bad.file: bad.content}, **{"train": bad.file, **bad.section})
    assert shown(caught.value) == list(bad.lines)
    assert not any("\n" in line for line in bad.lines)
    assert caught.value.exit_code == 2


NEEDS_TOKENIZER = {
    *("control token in a question", "control token in an answer", "tool calls that the template leaves out"),
    *("tools that the template ignores", "id outside the vocabulary", "negative id", "labels all masked", "overlong"),
    *("only the first token has a label", "more lost than allowed", "all lost", "all rows the same"),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_reading_alone_says_the_same(tmp_path, monkeypatch, bad: Bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / bad.file).parent.mkdir(exist_ok=True)
    (tmp_path / bad.file).write_bytes(bad.content)
    spec = DataSpec.model_validate({"train": bad.file, "eval": None, **bad.section})
    if bad.name in NEEDS_TOKENIZER or spec.chat_template is not None:
        check_rows(spec, "causal-lm", lambda line: None)
    else:
        with pytest.raises(LoraError) as caught:
            check_rows(spec, "causal-lm", lambda line: None)
        assert shown(caught.value) == list(bad.lines)


def test_there_are_enough_of_them():
    assert len(BAD) >= 60
    assert len({bad.name for bad in BAD}) == len(BAD)


def test_skipped_rows_are_counted_by_reason(prepared, chatml):
    good = b'{"text": "fine"}\n'
    flawed = [bad for bad in BAD if bad.file == "train.jsonl" and not bad.section and b"text" in bad.content]
    said: list[str] = []
    files = {"train.jsonl": good + b"\n".join(bad.content for bad in flawed)}
    data = prepared(
        chatml, files=files, info=said.append, on_bad_row="skip", max_loss=1.0, format="text", max_length=9999
    )
    tally = data.ledger.entries[0].tally
    assert tally.read == tally.kept + tally.dropped.total()
    assert {"malformed JSON", "repeated key", "NUL byte", "lone surrogate", "not a string"} <= set(tally.dropped)
    assert sum(line.startswith("skipped train.jsonl:") for line in said) == 5
    assert any("malformed JSON" in line for line in data.ledger.table())
