"""The label mask is exact for every family of chat templates: answers and their end-of-turn tokens, nothing else."""

import json

import numpy as np
import pytest

from lora_cli.data.chat_templates import NAMED_TEMPLATES
from lora_cli.data.dataset import show_mask
from lora_cli.data.encode import CausalLMEncoder
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs import tiny_tokenizers as tiny
from tests.inputs.tiny_tokenizers import build, supervised_texts


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


THREE = chat("Hello", "Hi there", "And  then?", "The answer\n\nis 42", "More", " spaced ")
QWEN = ("<|im_start|>", "<|endoftext|>")
FAMILIES = {
    "chatml": (build(*QWEN, eos="<|im_end|>", template=tiny.CHATML), "<|im_end|>", False),
    "llama3": (
        build("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", bos="<|begin_of_text|>", eos="<|eot_id|>",
              adds_bos=True, template=tiny.LLAMA3), "<|eot_id|>", True),
    "gemma": (
        build("<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>", adds_bos=True, template=tiny.GEMMA),
        "<end_of_turn>", True),
    "mistral": (build(bos="<s>", eos="</s>", adds_bos=True, template=tiny.MISTRAL), "</s>", True),
    "marked": (build(*QWEN, eos="<|im_end|>", template=tiny.MARKED), "<|im_end|>", False),
    "marked short": (build(*QWEN, eos="<|im_end|>", template=tiny.MARKED_SHORT), "<|im_end|>", False),
}  # fmt: skip


def file_of(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_end_tokens_are_supervised(prepared, family: str):
    tokenizer, end, trims = FAMILIES[family]
    row = prepared(tokenizer, files=file_of({"messages": THREE})).train[0]
    blank = " " if family == "mistral" else ""
    answers = [turn["content"] for turn in THREE if turn["role"] == "assistant"]
    assert supervised_texts(row, tokenizer) == [blank + (text.strip() if trims else text) + end for text in answers]
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(THREE)["input_ids"]
    assert set(row.labels[row.labels != -100]) <= set(row.input_ids)
    assert (row.labels == np.where(row.labels == -100, -100, row.input_ids)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_on_last_turn_and_loss_on_all(prepared, family: str):
    tokenizer, end, _ = FAMILIES[family]
    files = file_of({"messages": THREE})
    last = prepared(tokenizer, files=files, loss_on="last-turn").train[0]
    assert [text.strip().removesuffix(end).strip() for text in supervised_texts(last, tokenizer)] == ["spaced"]
    full = prepared(tokenizer, files=files, loss_on="all").train[0]
    assert full.labels[0] == -100
    assert (full.labels[1:] == full.input_ids[1:]).all()


def test_answers_that_the_template_rewrites_are_supervised_as_rendered(prepared):
    tokenizer = build(*QWEN, eos="<|im_end|>", template=tiny.QWEN3)
    one = prepared(tokenizer, files=file_of({"messages": chat("Hello", "Hi")})).train[0]
    assert supervised_texts(one, tokenizer) == ["<think>\n\n</think>\n\nHi<|im_end|>"]
    thinking = chat("Hello", "<think>\nhm\n</think>\n\nHi", "More", "<think>\nso\n</think>\n\nYes")
    data = prepared(tokenizer, files=file_of({"messages": thinking}))
    assert supervised_texts(data.train[0], tokenizer) == ["Hi<|im_end|>", "<think>\nso\n</think>\n\nYes<|im_end|>"]
    assert data.train[0].input_ids.tolist() == tokenizer.apply_chat_template(thinking)["input_ids"]
    # The rendering omits the reasoning of the first answer, which the ledger counts.
    tally = data.ledger.entries[0].tally
    assert (tally.dropped_reasoning, tally.rewritten) == (1, 0)


def test_tool_calls_are_supervised_and_tool_results_are_not(prepared):
    tokenizer = build(*QWEN, eos="<|im_end|>", template=tiny.QWEN3)
    call = {"id": "1", "function": {"name": "look_up", "arguments": '{"word": "dog"}'}}
    messages = [
        {"role": "user", "content": "What is a dog?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "an animal", "tool_call_id": "1"},
        {"role": "assistant", "content": "An animal."},
    ]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    for column in (tools, json.dumps(tools)):
        row = prepared(tokenizer, files=file_of({"messages": messages, "tools": column})).train[0]
        first, second = supervised_texts(row, tokenizer)
        assert "look_up" in first
        assert '{"word": "dog"}' in first  # the arguments' JSON text is not quoted twice
        assert first.endswith("</tool_call><|im_end|>")
        assert second == "<think>\n\n</think>\n\nAn animal.<|im_end|>"
        assert "# Tools" in tokenizer.decode(row.input_ids)


def test_sharegpt_and_alpaca_are_the_same_conversations(prepared, chatml):
    messages = chat("Tell me\nthe capital", "Paris", "Sure?", "Yes", system="Be brief")
    shared = {
        "system": "Be brief",
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in messages[1:]
        ],
    }
    alpaca = {
        "instruction": "Sure?",
        "input": "",
        "output": "Yes",
        "system": "Be brief",
        "history": [["Tell me\nthe capital", "Paris"]],
    }
    # One file for each format.
    rows = {"a.jsonl": {"messages": messages}, "b.jsonl": shared, "c.jsonl": alpaca}
    files = {name: json.dumps(row) for name, row in rows.items()}
    data = prepared(chatml, files=files, train=[{"path": name} for name in rows])
    assert len(data.train) == 3
    assert len(set(data.train.keys.tolist())) == 1
    joined = prepared(chatml, files=file_of({"instruction": "Tell me", "input": "the capital", "output": "Paris"}))
    assert "user\nTell me\nthe capital<|im_end|>" in chatml.decode(joined.train[0].input_ids)


def test_messages_in_a_column_of_another_name_are_recognized(prepared, chatml):
    printed: list[str] = []
    data = prepared(chatml, files=file_of({"conversations": chat("a", "b")}), info=printed.append)
    assert printed == ["train.jsonl: encoding, format messages (role and content in column conversations)"]
    assert len(data.train) == 1


def test_parts_of_text_are_joined(prepared, chatml):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    split = prepared(chatml, files=file_of({"messages": [{"role": "user", "content": parts}, *chat("", "b")[1:]]}))
    joined = prepared(chatml, files=file_of({"messages": chat("Hello", "b")}))
    assert split.fingerprint == joined.fingerprint


def test_text_and_completion_end_with_eos_and_begin_with_one_bos(prepared, base):
    cases = {
        "text": ({"text": "Hello you"}, "Hello you</s>"),
        "text that has both": ({"text": "<s>Hello you</s>"}, "Hello you</s>"),
        "completion": ({"prompt": "Hello", "completion": " you"}, " you</s>"),
        "conversation": ({"prompt": chat("Hello"), "completion": chat("", "you")[1:]}, " you</s>"),
    }
    for row, supervised in cases.values():
        encoded = prepared(base, files=file_of(row), chat_template=tiny.MISTRAL).train[0]
        assert supervised_texts(encoded, base) == [supervised]
        assert encoded.input_ids.tolist().count(base.bos_token_id) == 1
        assert encoded.input_ids[0] == base.bos_token_id
        assert encoded.input_ids.tolist().count(base.eos_token_id) == 1


def test_labels_of_sentencepiece_bytes_and_spaces(prepared):
    tokenizer = tiny.build_sentencepiece(tiny.MISTRAL)
    messages = chat("Hello", "the capital é漢", "  And?", "The answer")
    row = prepared(tokenizer, files=file_of({"messages": messages})).train[0]
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(row.labels[row.labels != -100].tolist())
    assert tokens[:2] == ["▁the", "▁capital"]
    assert tokens[-7:] == ["<0xE6>", "<0xBC>", "<0xA2>", "</s>", "▁The", "▁answer", "</s>"]


def test_a_token_that_crosses_the_start_of_an_answer_is_split_and_counted(prepared, chatml):
    # "capital" is one token of the tiny vocabulary; the answer begins within it.
    assert len(chatml(" capital")["input_ids"]) == 1
    data = prepared(chatml, files=file_of({"prompt": "The cap", "completion": "ital"}))
    row = data.train[0]
    assert supervised_texts(row, chatml) == ["ital<|im_end|>"]
    assert chatml.decode(row.input_ids) == "The capital<|im_end|>"
    assert row.input_ids[: len(chatml("The cap")["input_ids"])].tolist() == chatml("The cap")["input_ids"]
    assert data.ledger.entries[0].tally.splits == 1


def test_labels_in_the_row_are_the_only_mask(prepared, chatml):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6], "attention_mask": [1, 1]},
    ]
    data = prepared(chatml, files=file_of(*rows), loss_on="last-turn")
    assert [row.labels.tolist() for row in data.train] == [[-100, 6, -100, 8], [-100, 6, 7], [-100, 6]]
    assert data.train.supervised.tolist() == [2, 2, 1]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_fit_base_models(prepared, name: str):
    tokenizer = build(*NAMED_TEMPLATES[name].tokens, bos="<s>", eos="</s>", adds_bos=True)
    spec = {"chat_template": name, "max_length": 4096}
    for system in (None, "Be brief"):
        messages = chat("Hello", "Hi", "More", "Yes", system=system)
        row = prepared(tokenizer, files=file_of({"messages": messages}), **spec).train[0]
        end = next(
            (token for token in NAMED_TEMPLATES[name].tokens if token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")),
            "</s>",
        )
        assert [text.strip() for text in supervised_texts(row, tokenizer)] == [f"Hi{end}", f"Yes{end}"]
        ids = row.input_ids.tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ("Be brief" in tokenizer.decode(ids)) == (system is not None)


def test_templates_from_a_file_and_from_a_dict_are_used(prepared):
    plain = build(*QWEN, eos="<|im_end|>")
    several = build(*QWEN, eos="<|im_end|>", template={"default": tiny.CHATML, "tool_use": tiny.QWEN3})
    files = file_of({"messages": chat("Hello", "Hi")}) | {"t.jinja": tiny.CHATML}
    from_file = prepared(plain, files=files, chat_template="t.jinja")
    assert from_file.fingerprint == prepared(several, files=files).fingerprint
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = prepared(several, files=file_of({"messages": chat("Hello", "Hi"), "tools": tools})).train[0]
    assert "# Tools" in several.decode(with_tools.input_ids)


UNUSABLE = {
    "two BOS": ("{{ bos_token }}" + tiny.LLAMA3, "it writes two <s> at the start"),
    "no end of turn": (
        tiny.LLAMA3.replace("<|eot_id|>", ""),
        "expected an end-of-turn token after an answer, found nothing",
    ),
    "end for earlier answers only": (
        tiny.LLAMA3.replace("'<|eot_id|>'", "('' if loop.last else '<|eot_id|>')"),
        "expected an end-of-turn token after an answer, found nothing",
    ),
    "no generation prompt": (tiny.LLAMA3.split("{% if add_gen")[0], "it ignores add_generation_prompt"),
    "answers omitted": ("{{ messages[0]['content'] + '<|eot_id|>' }}", "it omits an answer"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_template_without_exact_labels_is_rejected(prepared, case: str):
    template, reason = UNUSABLE[case]
    tokenizer = build(
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos="<s>", eos="</s>", template=template
    )
    with pytest.raises(LoraError, match="the tokenizer's chat template cannot be used for training: ") as caught:
        prepared(tokenizer, files=file_of({"messages": chat("Hello", "Hi")}))
    assert reason in caught.value.message
    assert caught.value.hint


def test_an_omitted_system_message_is_a_bad_row(prepared):
    template = tiny.CHATML.replace("{{", "{% if message['role'] != 'system' %}{{", 1).replace("}}", "}}{% endif %}", 1)
    tokenizer = build(*QWEN, eos="<|im_end|>", template=template)
    with pytest.raises(LoraError) as caught:
        prepared(tokenizer, files=file_of({"messages": chat("Hello", "Hi", system="Be brief")}))
    assert caught.value.details == ("train.jsonl:1: the chat template omits the system message",)


@pytest.mark.slow
def test_special_tokens_that_are_not_control_tokens_are_text(prepared, smollm):
    row = prepared(smollm, files=file_of({"messages": chat("cp <filename> x", "ok")})).train[0]
    assert supervised_texts(row, smollm) == ["ok<|im_end|>"]


def test_conversations_need_a_template_and_a_fast_tokenizer(prepared, base):
    with pytest.raises(LoraError, match="the tokenizer has no chat template") as caught:
        prepared(base, files=file_of({"messages": chat("a", "b")}))
    assert "data.chat_template" in str(caught.value.hint)

    class Slow:
        is_fast = False

    with pytest.raises(LoraError, match="Slow is not a fast tokenizer"):
        CausalLMEncoder(DataSpec.model_validate({"train": "x"}), Slow())


def test_smollm_writes_its_own_system_message(prepared, smollm):
    row = prepared(smollm, files=file_of({"messages": chat("What is 2+2?", "4")})).train[0]
    assert supervised_texts(row, smollm) == ["4<|im_end|>"]
    mask = show_mask(row, smollm)
    assert [text for text, supervised in mask if supervised] == ["4", "<|im_end|>"]
    assert "".join(text for text, _ in mask).endswith("<|im_start|>assistant\n4<|im_end|>\n")
    assert row.input_ids.tolist() == smollm.apply_chat_template(chat("What is 2+2?", "4"))["input_ids"]
