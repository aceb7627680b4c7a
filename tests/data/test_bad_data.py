"""Every bad data file gives its exact error message; with `on_bad_row: skip`, bad rows are dropped and counted."""

import pytest

from lora_cli.data.examples import check_rows
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.bad_files import BAD_FILES, Bad
from tests.inputs.bad_rows import BAD_ROWS

BAD = [*BAD_FILES, *BAD_ROWS]
USUAL_HINT = "hint: fix them, or set data.on_bad_row: skip to drop and count them"


def lines_of(error: LoraError) -> list[str]:
    """Return the lines of a message, without error and hint if they are the usual ones."""
    lines = [*error.details, f"error: {error.message}", f"hint: {error.hint}"]
    return lines[:-2] if lines[-1] == USUAL_HINT else lines


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_data_gives_its_exact_message(prepared, chatml, bad: Bad):
    with pytest.raises(LoraError) as caught:
        prepared(chatml, files={bad.file: bad.content}, **{"train": bad.file, **bad.section})
    assert lines_of(caught.value) == list(bad.lines)
    assert not any("\n" in line for line in bad.lines)
    assert caught.value.exit_code == 2


NEEDS_TOKENIZER = {
    *("control token in a question", "control token in an answer", "tool calls omitted by the template"),
    *("tools that the template ignores", "id outside the vocabulary", "negative id", "labels all masked", "overlong"),
    *("loss flag with loss on all tokens", "stride and BOS that fill a chunk"),
    *("only the first token has a label", "all rows identical"),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_check_without_tokenizer_gives_the_same_message(tmp_path, monkeypatch, bad: Bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / bad.file).parent.mkdir(exist_ok=True)
    (tmp_path / bad.file).write_bytes(bad.content)
    spec = DataSpec.model_validate({"train": bad.file, "eval": None, **bad.section})
    if bad.name in NEEDS_TOKENIZER or spec.chat_template is not None:
        check_rows(spec, "causal-lm", lambda line: None)
    else:
        with pytest.raises(LoraError) as caught:
            check_rows(spec, "causal-lm", lambda line: None)
        assert lines_of(caught.value) == list(bad.lines)


def test_there_are_enough_cases_with_unique_names():
    assert len(BAD) >= 60
    assert len({bad.name for bad in BAD}) == len(BAD)


def test_skipped_rows_are_counted_by_reason(prepared, chatml):
    good = b'{"text": "fine"}\n'
    flawed = [bad for bad in BAD if bad.file == "train.jsonl" and not bad.section and b"text" in bad.content]
    messages: list[str] = []
    files = {"train.jsonl": good + b"\n".join(bad.content for bad in flawed)}
    data = prepared(
        chatml, files=files, info=messages.append, on_bad_row="skip", max_loss=1.0, format="text", max_length=9999
    )
    tally = data.ledger.entries[0].tally
    assert tally.read == tally.kept + tally.dropped.total()
    assert {"malformed JSON", "repeated key", "NUL byte", "lone surrogate", "not a string"} <= set(tally.dropped)
    assert sum(line.startswith("skipped train.jsonl:") for line in messages) == 5
    assert any("malformed JSON" in line for line in data.ledger.table())
