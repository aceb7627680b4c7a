"""Turns out of the usual order: joined, or cut to the last answer, with exact text, loss and counts."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.examples import check_rows
from lora_cli.data.formats import parse_row
from lora_cli.data.records import BadRow
from lora_cli.data.turns import SEPARATOR, TurnOptions
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.tiny_tokenizers import supervised_texts

JOIN = TurnOptions(join=True)
CUT = TurnOptions(cut_end=True)


def say(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def lines(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def test_turns_of_one_role_are_joined_with_an_empty_line_and_counted(prepared, chatml):
    several = [
        *(say("system", "Be brief."), say("system", "Be kind."), say("user", "Hello"), say("user", "Who are you?")),
        *(say("assistant", "A model."), say("assistant", ""), say("user", "And"), say("assistant", "Yes")),
    ]
    several[5]["content"] = "Of words."
    one = [
        *(say("system", "Be brief.\n\nBe kind."), say("user", "Hello\n\nWho are you?")),
        *(say("assistant", "A model.\n\nOf words."), say("user", "And"), say("assistant", "Yes")),
    ]
    joined = prepared(chatml, files=lines({"messages": several}), merge_turns=True)
    assert joined.fingerprint == prepared(chatml, files=lines({"messages": one})).fingerprint
    assert "  3 turns joined with the turn before, of the same role" in joined.ledger.table()
    shared = [
        {"from": {"assistant": "gpt", "user": "human"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in several
    ]
    assert prepared(chatml, files=lines({"conversations": shared}), merge_turns=True).fingerprint == joined.fingerprint
    split = {"prompt": several[:4], "completion": several[4:]}
    assert prepared(chatml, files=lines(split), merge_turns=True).fingerprint == joined.fingerprint
    with pytest.raises(LoraError) as caught:
        prepared(chatml, files=lines({"messages": several}))
    assert caught.value.details == ("train.jsonl:1: messages[1].role: system must be the first message",)
    assert caught.value.hint is not None
    assert "data.merge_turns: true" in caught.value.hint


texts = st.text(st.sampled_from("ab \n.é"), min_size=1, max_size=5).filter(str.strip)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(turns=turns)
def test_joining_keeps_every_text_in_order(turns: list[tuple[str, str]]):
    rows = [say(role, text) for role, text in [*turns, ("assistant", "end")]]
    chat = parse_row({"messages": rows}, "messages", JOIN)
    assert SEPARATOR.join(m["content"] for m in chat.messages) == SEPARATOR.join(m["content"] for m in rows)
    roles = [m["role"] for m in chat.messages]
    assert all(one != other for one, other in pairwise(roles))
    assert chat.joined == len(rows) - len(roles)
    again = parse_row({"messages": chat.messages}, "messages", JOIN)
    assert (again.messages, again.joined) == (chat.messages, 0)


def test_loss_flags_of_joined_turns_stay_on_their_text(prepared, chatml):
    def learnt(*answers: dict[str, Any]) -> list[str]:
        row = {"messages": [say("user", "Hello"), *answers]}
        return supervised_texts(prepared(chatml, files=lines(row), merge_turns=True).train[0], chatml)

    hi, you = say("assistant", "Hi"), say("assistant", "you")
    assert learnt(hi, you) == ["Hi\n\nyou<|im_end|>"]
    assert learnt({**hi, "weight": 0}, you) == ["\n\nyou<|im_end|>"]
    assert learnt(hi, {**you, "weight": 0}) == ["Hi"]
    assert learnt(hi, {**you, "weight": 0}, hi) == ["Hi", "\n\nHi<|im_end|>"]
    data = prepared(chatml, files=lines({"messages": [say("user", "x"), {**hi, "weight": 0}, you]}), merge_turns=True)
    assert (data.ledger.entries[0].tally.answers_masked, data.ledger.entries[0].tally.parts_masked) == (0, 1)


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
OTHER_CALL = {"type": "function", "function": {"name": "g", "arguments": {}}}


def test_tool_calls_of_joined_answers_are_kept_in_order():
    def join(*answers: dict[str, Any]) -> list[dict[str, Any]]:
        rows = [say("user", "x"), *answers, say("tool", "1"), say("tool", "2"), say("assistant", "done")]
        return parse_row({"messages": rows}, "messages", JOIN).messages[1:]

    first, second = say("assistant", None, tool_calls=[CALL]), say("assistant", None, tool_calls=[OTHER_CALL])
    results = [say("tool", "1"), say("tool", "2"), say("assistant", "done")]
    assert join(first, second) == [say("assistant", "", tool_calls=[CALL, OTHER_CALL]), *results]
    assert join(say("assistant", "I look."), second) == [say("assistant", "I look.", tool_calls=[OTHER_CALL]), *results]
    for unjoinable in (
        (first, say("assistant", "text behind a call", tool_calls=[OTHER_CALL])),
        (say("assistant", "a"), say("assistant", None, tool_calls=[CALL], reasoning_content="hm")),
        ({**first, "weight": 0}, second),
    ):
        with pytest.raises(BadRow) as caught:
            join(*unjoinable)
        assert caught.value.problem == (
            "assistant cannot follow assistant: data.merge_turns cannot join them, because their other fields do not "
            "fit one turn"
        )
    with pytest.raises(BadRow, match="wrong role order"):  # two speakers
        parse_row(
            {"messages": [say("user", "a", name="Ann"), say("user", "b", name="Bo"), say("assistant", "c")]},
            "messages",
            JOIN,
        )


ANSWERED = [say("user", "Hello"), say("assistant", "Hi")]


@pytest.mark.parametrize(
    "rest",
    [
        [say("user", "More")],
        [say("user", "More"), say("user", "Please")],
        [say("tool", "x")],
        [say("user", "More"), say("system", "s")],
    ],
)
def test_turns_behind_the_last_answer_are_cut_where_bad_rows_are_skipped(prepared, chatml, rest: list[Any]):
    rows = lines({"messages": [*ANSWERED, *rest]}, {"messages": [*ANSWERED, say("user", "a"), say("assistant", "b")]})
    alone = prepared(chatml, files=lines({"messages": ANSWERED}))
    data = prepared(chatml, files=rows, on_bad_row="skip")
    assert data.train[0].input_ids.tolist() == alone.train[0].input_ids.tolist()
    assert data.ledger.table()[1:3] == [
        "  2 rows read = 2 for train",
        "  1 row cut to the last answer: other turns followed it",
    ]
    (checked,) = check_rows(DataSpec(train="train.jsonl", eval=None, on_bad_row="skip"), "causal-lm", print)
    assert checked.notes == ["1 row cut to the last answer: other turns followed it"]
    with pytest.raises(LoraError, match="1 of 2 rows is bad"):
        prepared(chatml, files=rows)


def test_a_conversation_without_answer_is_dropped(prepared, chatml):
    rows = lines({"messages": ANSWERED}, {"messages": [say("user", "Hello")]})
    data = prepared(chatml, files=rows, on_bad_row="skip", max_loss=1.0)
    assert data.ledger.table()[1:3] == ["  2 rows read = 1 for train + 1 dropped", "  dropped 1: no answer"]


def test_a_tool_call_is_the_last_answer():
    rows = [say("user", "x"), say("assistant", None, tool_calls=[CALL]), say("tool", "1")]
    chat = parse_row({"messages": rows}, "messages", CUT)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.cut
