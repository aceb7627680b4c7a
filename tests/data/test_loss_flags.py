"""Loss flags of turns and parts: exactly the flagged text carries loss, for every spelling and format."""

import json
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.encode import CausalLMEncoder, EncodedRow
from lora_cli.data.formats import parse_row
from lora_cli.data.loss_flags import LOSS_FLAGS
from lora_cli.data.records import BadRow
from lora_cli.data.turns import TurnOptions
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs import tiny_tokenizers as tiny
from tests.inputs.tiny_tokenizers import build, supervised_texts

# tokenizer, end-of-turn token, text before each answer, whether the template trims the content
FAMILIES = {
    "chatml": (build("<|im_start|>", eos="<|im_end|>", template=tiny.CHATML), "<|im_end|>", "", False),
    "llama3": (
        build("<|start_header_id|>", "<|end_header_id|>", bos="<s>", eos="<|eot_id|>", template=tiny.LLAMA3),
        "<|eot_id|>",
        "",
        True,
    ),
    "mistral": (build(bos="<s>", eos="</s>", template=tiny.MISTRAL), "</s>", " ", True),
    "marked": (build("<|im_start|>", eos="<|im_end|>", template=tiny.MARKED_SHORT), "<|im_end|>", "", False),
}
ENCODERS = {name: CausalLMEncoder(DataSpec(train="x"), family[0]) for name, family in FAMILIES.items()}
SENTENCEPIECE = CausalLMEncoder(DataSpec(train="x"), tiny.build_sentencepiece(tiny.MISTRAL))

Part = tuple[str, bool | None]
letters = st.sampled_from([*list("ab \n.é漢🙂<|>[]{}/'"), "capital", " the", "\r\n", "́", "assistant\n", "\xa0"])
texts = st.lists(letters, max_size=6).map("".join)
flags = st.sampled_from([None, True, False])
answers = st.tuples(
    flags, st.lists(st.tuples(texts, flags), min_size=1, max_size=4).filter(lambda p: "".join(t for t, _ in p).strip())
).map(lambda answer: (None if answer[0] is False and any(f for _, f in answer[1]) else answer[0], answer[1]))
conversations = st.lists(st.tuples(texts.filter(str.strip), answers), min_size=1, max_size=3)


def messages_of(turns: list[Any], *, flagged: bool = True) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, (flag, parts) in turns:
        blocks = [
            {"type": "text", "text": text, **({} if part is None or not flagged else {"weight": int(part)})}
            for text, part in parts
        ]
        answer = {"role": "assistant", "content": blocks}
        messages += [{"role": "user", "content": question}, answer | ({} if flag is None else {"weight": int(flag)})]
    return messages


def expected(turns: list[Any], *, end: str, lead: str, trims: bool) -> list[str]:
    """Return the text with loss, from a flag for each character."""
    learnt = []
    for _, (turn, parts) in turns:
        marks = [(letter, turn is not False if flag is None else flag) for text, flag in parts for letter in text]
        first, last = marks[0][1], marks[-1][1]
        while trims and marks[0][0].isspace():
            del marks[0]
        while trims and marks[-1][0].isspace():
            del marks[-1]
        written = [(letter, first) for letter in lead] + marks + [(end, last)]
        runs = groupby(written, key=lambda mark: mark[1])
        learnt += ["".join(letter for letter, _ in run) for loss, run in runs if loss]
    return learnt


def encode(messages: list[dict[str, Any]], encoder: CausalLMEncoder) -> EncodedRow | BadRow:
    try:
        (row,) = encoder.encode([parse_row({"messages": messages}, "messages", TurnOptions())])
    except BadRow as bad:
        return bad
    return row


def learnt_texts(row: EncodedRow, encoder: CausalLMEncoder) -> list[str]:
    decode = encoder.tokenizer.backend_tokenizer.decode
    return [decode(row.ids[start:stop].tolist(), skip_special_tokens=False) for start, stop in row.supervised_spans]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_the_text_with_loss_is_the_flagged_text(family: str, turns: list[Any]):
    _, end, lead, trims = FAMILIES[family]
    row = encode(messages_of(turns), ENCODERS[family])
    wanted = expected(turns, end=end, lead=lead, trims=trims)
    if isinstance(row, BadRow):
        assert (row.reason, wanted) == ("nothing to learn", [])
    else:
        assert learnt_texts(row, ENCODERS[family]) == wanted
        plain = encode(messages_of([(q, (None, parts)) for q, (_, parts) in turns], flagged=False), ENCODERS[family])
        assert isinstance(plain, EncodedRow)
        decode = ENCODERS[family].tokenizer.backend_tokenizer.decode
        assert decode(row.ids.tolist(), skip_special_tokens=False) == decode(
            plain.ids.tolist(), skip_special_tokens=False
        )
        assert row.split or row.ids.tolist() == plain.ids.tolist()


@settings(max_examples=40, deadline=None)
@given(turns=conversations, family=st.sampled_from(list(FAMILIES)), value=st.sampled_from([1, True, 1.0, "true"]))
def test_flags_that_are_all_true_change_nothing(turns: list[Any], family: str, value: object):
    plain = messages_of([(q, (None, parts)) for q, (_, parts) in turns], flagged=False)
    flagged = [
        {**m, "train": value, "content": [{**part, "weight": value} for part in m["content"]]}
        if m["role"] == "assistant"
        else m
        for m in plain
    ]
    one, other = (encode(messages, ENCODERS[family]) for messages in (plain, flagged))
    assert isinstance(one, EncodedRow)
    assert isinstance(other, EncodedRow)
    assert (one.key, one.split) == (other.key, other.split)


@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_a_sentencepiece_flag_within_a_token_is_refused_and_any_other_is_exact(turns: list[Any]):
    row = encode(messages_of(turns), SENTENCEPIECE)
    if isinstance(row, BadRow):
        assert row.reason in {"nothing to learn", "loss flag inside a token", "answer begins inside a token"}
    else:
        wanted = expected(turns, end="</s>", lead=" ", trims=True)
        spans = [row.ids[start:stop].tolist() for start, stop in row.supervised_spans]
        assert [sentencepiece_text(ids) for ids in spans] == wanted


def sentencepiece_text(ids: list[int]) -> str:
    tokens = SENTENCEPIECE.tokenizer.convert_ids_to_tokens(ids)
    encoded = (bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens)
    return b"".join(encoded).decode()


def lines(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def chat(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    question = {"role": "user", "content": "Hello"}
    return [question, {"role": "assistant", **first}, question, {"role": "assistant", **second}]


WITHOUT_FIRST = chat({"content": "Hi", "weight": 0}, {"content": "Yes"})


@pytest.mark.parametrize("name", LOSS_FLAGS)
@pytest.mark.parametrize("loss", [True, False])
def test_every_name_and_spelling_of_a_flag_is_read(name: str, loss: bool):
    encoder = ENCODERS["chatml"]
    wanted = ["Hi<|im_end|>", "Yes<|im_end|>"] if loss else ["Yes<|im_end|>"]
    value = loss == LOSS_FLAGS[name]
    for spelling in (value, int(value), float(value), str(value), str(value).lower(), str(int(value))):
        row = encode(chat({"content": "Hi", name: spelling}, {"content": "Yes", name: None}), encoder)
        assert isinstance(row, EncodedRow)
        assert learnt_texts(row, encoder) == wanted
        part = {"type": "text", "text": "Hi", name: spelling}
        row = encode(chat({"content": [part]}, {"content": "Yes"}), encoder)
        assert isinstance(row, EncodedRow)
        assert learnt_texts(row, encoder) == wanted


def test_every_format_of_conversations_has_the_same_flags(prepared, chatml):
    speakers = {"user": "human", "assistant": "gpt"}
    shared = [
        {"from": speakers[m["role"]], "value": m["content"]} | {k: m[k] for k in m if k == "weight"}
        for m in WITHOUT_FIRST
    ]
    rows = [
        {"messages": WITHOUT_FIRST},
        {"conversations": shared},
        {"prompt": WITHOUT_FIRST[:3], "completion": WITHOUT_FIRST[3:]},
        {"messages": json.dumps(WITHOUT_FIRST)},
    ]
    files = {f"{number}.jsonl": json.dumps(row) for number, row in enumerate(rows)}
    data = prepared(chatml, files=files, train=[{"path": name} for name in files])
    assert [supervised_texts(row, chatml) for row in data.train] == [["Yes<|im_end|>"]] * 4
    assert len(set(data.train.keys.tolist())) == 1
    assert all("  1 answer without loss, by their loss flags" in data.ledger.table() for _ in rows)


def test_flags_are_not_given_to_the_template():
    ranges = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    messages = chat(
        {"content": "Hi", "train_detail": ranges}, {"content": [{"type": "text", "text": "Yes", "loss": 1}]}
    )
    flagged = [{**message, "weight": 0} if message["role"] == "user" else message for message in messages]
    row = parse_row({"messages": flagged}, "messages", TurnOptions())
    assert row.messages == chat({"content": "Hi"}, {"content": "Yes"})


def test_nulls_of_a_table_are_no_flags(prepared, chatml, tmp_path):
    messages = [{"role": m["role"], "content": m["content"], "weight": m.get("weight")} for m in WITHOUT_FIRST]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "rows.parquet")
    data = prepared(chatml, train="rows.parquet")
    assert data.fingerprint == prepared(chatml, files=lines({"messages": WITHOUT_FIRST})).fingerprint


def test_ranges_of_characters_as_in_axolotl():
    encoder = ENCODERS["chatml"]
    ranges = [
        {"begin_offset": 0, "end_offset": 2, "train": True},
        {"begin_offset": 4, "end_offset": 5, "train": False},
        {"begin_offset": 6, "end_offset": 8, "train": True},
    ]
    for turn in ({}, {"train": True}):
        row = encode(chat({"content": "012345678", "train_detail": ranges, **turn}, {"content": "Yes"}), encoder)
        assert isinstance(row, EncodedRow)
        assert learnt_texts(row, encoder) == ["012", "678<|im_end|>", "Yes<|im_end|>"]
    row = encode(chat({"content": "012345678", "train_detail": ranges[:2]}, {"content": "Yes"}), encoder)
    assert isinstance(row, EncodedRow)
    assert learnt_texts(row, encoder) == ["012", "Yes<|im_end|>"]


QWEN3 = CausalLMEncoder(DataSpec(train="x"), build("<|im_start|>", eos="<|im_end|>", template=tiny.QWEN3))


def test_tool_calls_follow_the_flag_of_their_turn():
    call = {"function": {"name": "look_up", "arguments": {"word": "dog"}}}
    parts = [{"type": "text", "text": "Let me see. ", "weight": 0}, {"type": "text", "text": "I look."}]

    def rows(first: dict[str, Any]) -> list[str]:
        messages = [
            {"role": "user", "content": "What is a dog?"},
            {"role": "assistant", "tool_calls": [call], **first},
            {"role": "tool", "content": "an animal", "weight": 0},
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nAn animal."},
        ]
        row = encode(messages, QWEN3)
        assert isinstance(row, EncodedRow)
        return learnt_texts(row, QWEN3)

    written = '\n<tool_call>\n{"name": "look_up", "arguments": {"word": "dog"}}\n</tool_call><|im_end|>'
    last = "<think>\nso\n</think>\n\nAn animal.<|im_end|>"
    assert rows({"content": parts}) == ["I look." + written, last]
    assert rows({"content": "I look.", "weight": 0}) == [last]
    assert rows({"content": [{**parts[1], "weight": 0}]}) == [written, last]
    assert rows({"content": None, "loss": False}) == [last]
    assert rows({"content": parts[::-1]}) == ["I look.", written, last]


def test_arguments_of_a_call_are_not_taken_for_text_that_the_template_omits(chatml):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.tool_calls | tojson if m.tool_calls else m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = CausalLMEncoder(DataSpec(train="x", chat_template=template), chatml)
    call = {"function": {"name": "look_up", "arguments": {"word": "dog"}}}
    answer = {"role": "assistant", "tool_calls": [call], "content": [{"type": "text", "text": "dog", "weight": 0}]}
    row = encode([{"role": "user", "content": "What?"}, answer], encoder)
    assert isinstance(row, BadRow)
    assert row.problem == "has loss flags on parts of an answer that the chat template writes differently"


def test_reasoning_follows_the_flag_of_its_turn_or_part():
    def learnt(answer: dict[str, Any]) -> list[str]:
        row = encode([{"role": "user", "content": "Hello"}, {"role": "assistant", **answer}], QWEN3)
        assert isinstance(row, EncodedRow), row.problem
        return learnt_texts(row, QWEN3)

    def parts(*flagged: Part) -> dict[str, Any]:
        return {
            "content": [
                {"type": "text", "text": text} | ({} if flag is None else {"loss": flag}) for text, flag in flagged
            ]
        }

    think = "<think>\nhm\n</think>\n\n"
    assert learnt(parts((think, False), ("Hi", True))) == ["Hi<|im_end|>"]
    assert learnt(parts((think, True), ("Hi", False))) == [think]
    # The template writes the reasoning differently: it is still the first part.
    assert learnt(parts(("<think>hm</think>", False), ("Hi", None))) == ["Hi<|im_end|>"]
    reasoned = {"reasoning_content": "hm", **parts(("Hi", False), (" you", True))}
    assert learnt(reasoned) == [think, " you<|im_end|>"]
    with pytest.raises(AssertionError, match="that the chat template writes differently"):
        learnt(parts(("<think>h", False), ("m</think>", True), ("Hi", False)))


def test_a_part_that_begins_inside_a_token_is_tokenized_separately_and_counted(prepared, chatml):
    assert len(chatml(" capital")["input_ids"]) == 1
    parts = [{"type": "text", "text": "The cap", "weight": 0}, {"type": "text", "text": "ital"}]
    data = prepared(
        chatml, files=lines({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]})
    )
    assert supervised_texts(data.train[0], chatml) == ["ital<|im_end|>"]
    assert data.ledger.entries[0].tally.splits == 1
    assert data.ledger.table()[2:4] == [
        "  1 part of answers without loss, by their loss flags",
        "  1 row with an answer, or a part of one, that began inside a token and was tokenized separately",
    ]


def test_flags_only_take_loss_away_from_what_loss_on_selects(prepared, chatml):
    rows = lines({"messages": WITHOUT_FIRST})
    full = prepared(chatml, files=rows, loss_on="all").train[0]
    assert supervised_texts(full, chatml) == [
        "user\nHello<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    ]
    assert supervised_texts(prepared(chatml, files=rows, loss_on="last-turn").train[0], chatml) == ["Yes<|im_end|>"]
    without_last = lines({"messages": chat({"content": "Hi"}, {"content": "Yes", "weight": 0})})
    with pytest.raises(LoraError) as caught:
        prepared(chatml, files=without_last, loss_on="last-turn")
    problem = "train.jsonl:1: no token of the row carries loss: its loss flags leave none of what data.loss_on selects"
    assert caught.value.details == (problem,)


def test_a_flag_of_zero_on_other_turns_is_harmless(prepared, chatml):
    plain = [{"role": "system", "content": "s"}, *chat({"content": "Hi"}, {"content": "Yes"})]
    flagged = [m | ({"weight": 0, "train": False} if m["role"] != "assistant" else {}) for m in plain]
    one, other = (prepared(chatml, files=lines({"messages": messages})) for messages in (plain, flagged))
    assert one.fingerprint == other.fingerprint
    assert not other.ledger.entries[0].tally.answers_masked


def test_rows_without_loss_are_dropped_and_the_flags_of_dropped_rows_are_not_counted(prepared, chatml):
    silent = chat({"content": "Hi", "weight": 0}, {"content": "Yes", "train": False})
    data = prepared(
        chatml,
        files=lines({"messages": silent}, {"messages": WITHOUT_FIRST}),
        on_bad_row="skip",
        max_loss=1.0,
    )
    assert data.ledger.table()[1:4] == [
        "  2 rows read = 1 for train + 1 dropped",
        "  dropped 1: nothing to learn",
        "  1 answer without loss, by their loss flags",
    ]
