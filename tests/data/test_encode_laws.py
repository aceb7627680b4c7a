"""Properties of encoding random conversations: ids as in transformers, text preserved, exact answer spans."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.conversation import Conversation
from lora_cli.data.encode import CausalLMEncoder, EncodedRow, truncate_row
from lora_cli.data.formats import Document, PromptCompletion
from lora_cli.data.records import BadRow
from lora_cli.recipe.schema import DataSpec
from tests.inputs import tiny_tokenizers as tiny
from tests.inputs.tiny_tokenizers import build

FAMILIES = {
    "chatml": (build("<|im_start|>", eos="<|im_end|>", template=tiny.CHATML), "<|im_end|>", str),
    "llama3": (
        build("<|start_header_id|>", "<|end_header_id|>", bos="<s>", eos="<|eot_id|>", template=tiny.LLAMA3),
        "<|eot_id|>",
        str.strip,
    ),
    "mistral": (build(bos="<s>", eos="</s>", template=tiny.MISTRAL), "</s>", lambda text: " " + text.strip()),
    "marked": (build("<|im_start|>", eos="<|im_end|>", template=tiny.MARKED_SHORT), "<|im_end|>", str),
}
ENCODERS = {name: CausalLMEncoder(DataSpec(train="x"), family[0]) for name, family in FAMILIES.items()}

letters = st.sampled_from([*list("ab \n\t.é漢🙂<|>[]{}/'\""), "capital", " the", "\r\n", "́", "assistant\n", "\xa0"])
content = st.lists(letters, min_size=1, max_size=12).map("".join).filter(lambda text: text.strip())


def roles_of(contents: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


conversations = st.lists(st.tuples(content, content), min_size=1, max_size=3).map(
    lambda pairs: roles_of(sum(pairs, ()))
)


def text_of(encoder: CausalLMEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(messages=conversations)
def test_conversations_have_exact_ids_and_answer_spans(family: str, messages: list[dict[str, str]]):
    tokenizer, end, as_rendered = FAMILIES[family]
    encoder = ENCODERS[family]
    (row,) = encoder.encode([Conversation(messages, None)])
    assert isinstance(row, EncodedRow)
    ids = row.ids.tolist()
    assert text_of(encoder, ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    if not row.split:
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    answers = [as_rendered(message["content"]) + end for message in messages if message["role"] == "assistant"]
    assert [text_of(encoder, ids[start:stop]) for start, stop in row.supervised_spans] == answers


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"])), completion=content)
def test_completions_have_exact_ids_and_answer_spans(prompt: str, completion: str):
    encoder = ENCODERS["chatml"]
    (row,) = encoder.encode([PromptCompletion(prompt, completion)])
    if isinstance(row, BadRow):  # a single token carries no loss
        assert row.reason in {"nothing to learn", "answer begins inside a token"}
        return
    ids = row.ids.tolist()
    assert text_of(encoder, ids) == prompt + completion + "<|im_end|>"
    ((start, stop),) = row.answer_spans
    assert text_of(encoder, ids[start:stop]) == completion + "<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(text=content, length=st.integers(2, 30))
def test_a_truncated_row_is_a_prefix_and_keeps_its_labels(text: str, length: int):
    (row,) = ENCODERS["chatml"].encode([Document(text * 3)])
    assert isinstance(row, EncodedRow)
    truncated = truncate_row(row, length)
    assert truncated.ids.tolist() == row.ids.tolist()[:length]
    assert truncated.supervised == min(row.supervised, length - 1)
    assert (truncated.key == row.key) == (len(row.ids) <= length)


@settings(max_examples=60, deadline=None)
@given(messages=conversations, token=st.sampled_from(["<|im_start|>", "<|im_end|>"]), at=st.integers(0, 5))
def test_control_tokens_in_messages_are_rejected(messages: list[dict[str, str]], token: str, at: int):
    index = at % len(messages)
    messages[index] = {**messages[index], "content": messages[index]["content"] + token}
    (row,) = ENCODERS["chatml"].encode([Conversation(messages, None)])
    assert isinstance(row, BadRow)
    assert row.reason == "control token in the text"
