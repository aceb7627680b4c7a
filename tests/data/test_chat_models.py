"""Labels to the letter for the most used chat models: templates, token flags, reasoning, variables, the date."""

import json
import re

import pytest

from lora_cli.data.chat_templates import saved_template
from lora_cli.data.conversation import Conversation
from lora_cli.data.encode import CausalLMEncoder
from lora_cli.data.render_chats import UntokenizedRow
from lora_cli.data.template_variables import with_defaults
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.chat_models import CHATS, DS_BOS, DS_EOS, MODELS, PHI3
from tests.inputs.tiny_tokenizers import supervised_texts

DAY = "2026-01-05"


def messages_of(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[name]]


def file_of(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def marked(tokenizer, messages, **variables) -> str:
    """Return the rendered conversation with [[ ]] around what carries loss."""
    encoder = CausalLMEncoder(DataSpec.model_validate({"train": "x", "template_date": DAY}), tokenizer)
    chat = Conversation(messages, None, variables=variables)
    (row,) = encoder.start([chat]).rows
    assert isinstance(row, UntokenizedRow)
    text = row.text
    for start, stop in reversed(row.answers):
        text = text[:start] + "[[" + text[start:stop] + "]]" + text[stop:]
    return text


@pytest.mark.parametrize("name", MODELS)
def test_text_and_labels_of_each_model(prepared, name: str):
    model = MODELS[name]
    tokenizer = model.tokenizer()
    expected = {chat: text for chat in CHATS if (text := getattr(model, chat)) is not None}
    assert {chat: marked(tokenizer, messages_of(chat)) for chat in expected} == expected
    files = file_of(*({"messages": messages_of(chat)} for chat in expected))
    data = prepared(tokenizer, files=files, template_date=DAY)
    for (chat, text), row in zip(expected.items(), data.train, strict=True):
        learnt = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
        assert [part.strip() for part in supervised_texts(row, tokenizer)] == [part.strip() for part in learnt]
        if "strftime_now" not in model.template:
            rendered = tokenizer.apply_chat_template(messages_of(chat))["input_ids"]
            end = [tokenizer.convert_tokens_to_ids("<|user|>")] if name == "glm4" else []
            assert row.input_ids.tolist() == rendered + end
    if "system" not in expected:
        with pytest.raises(LoraError) as caught:
            prepared(tokenizer, files=file_of({"messages": messages_of("system")}))
        assert caught.value.details in (
            ("train.jsonl:1: the chat template rejects the row: System role not supported",),
            ("train.jsonl:1: the chat template omits the system message",),
        )


def asked(*answers: dict[str, str] | str) -> list[dict[str, str]]:
    """Return a conversation with a question before each answer: a text, or fields of the message."""
    chat = []
    for number, answer in enumerate(answers):
        fields = {"content": answer} if isinstance(answer, str) else answer
        chat += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", **fields}]
    return chat


REASONED = [
    {"content": "4", "reasoning_content": "2+2"},
    {"content": "4", "thinking": "2+2"},
    {"content": "4", "reasoning": "2+2"},
    {"content": "<think>\n2+2\n</think>\n\n4"},
    {"content": "<think>2+2</think>4"},
]
Q = "<|im_start|>user\nq{}<|im_end|>\n<|im_start|>assistant\n"
OSS_START = "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2026-01-05\n\nReasoning: medium<|end|>"


@pytest.mark.parametrize("answer", REASONED, ids=["reasoning_content", "thinking", "reasoning", "inline", "no breaks"])
def test_reasoning_is_learnt_in_the_form_that_the_template_reads(prepared, answer: dict[str, str]):
    def text(name: str, **variables: object) -> str:
        return marked(MODELS[name].tokenizer(), asked(answer), **variables)

    thought = "[[<think>\n2+2\n</think>\n\n4<|im_end|>]]\n"
    assert text("qwen3") == Q.format(0) + thought
    assert text("qwen3", enable_thinking=True) == Q.format(0) + thought
    assert text("qwen3 thinking") == Q.format(0) + "<think>\n[[2+2\n</think>\n\n4<|im_end|>]]\n"
    # gpt-oss writes two messages for an answer with reasoning; the second header is generated too.
    assert text("gpt-oss") == (
        OSS_START + "<|start|>user<|message|>q0<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>]]"
    )
    # The templates of DeepSeek omit it; it follows the generation prompt, which opens its block.
    r1 = f"{DS_BOS}<｜User｜>q0<｜Assistant｜><think>\n[[2+2\n</think>\n\n4{DS_EOS}]]"
    assert text("deepseek r1 and distilled") == r1
    v31 = f"{DS_BOS}<｜User｜>q0<｜Assistant｜><think>[[2+2</think>4{DS_EOS}]]"
    assert text("deepseek v3.1", thinking=True) == v31
    if "breaks" not in answer["content"] and "<think>2" not in answer["content"]:
        # Templates without a field for it: at the start of the content.
        assert text("yi, hermes") == Q.format(0) + thought
        assert text("qwq") == Q.format(0) + "<think>\n[[2+2\n</think>\n\n4<|im_end|>]]\n"


def test_variables_of_one_row_with_which_the_template_fails_are_a_bad_row(prepared):
    tokenizer = MODELS["gpt-oss"].tokenizer()
    efforts = "{% if reasoning_effort not in ('low', 'high') %}{{ raise_exception('no such effort') }}{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- for", efforts + "{%- for", 1)
    rows = [
        {"messages": asked("4"), "chat_template_kwargs": {"reasoning_effort": effort}} for effort in ("low", "x", "x")
    ]
    data = prepared(tokenizer, files=file_of(*rows), on_bad_row="skip", max_loss=1.0)
    assert [row.where for row in data.train] == ["train.jsonl:1"]
    assert data.ledger.entries[0].tally.dropped == {"unusable template variables": 2}
    with pytest.raises(LoraError) as caught:
        prepared(tokenizer, files=file_of(*rows))
    problem = (
        "train.jsonl:2: the tokenizer's chat template cannot be used for training: it rejects the row: no such effort "
        '(with reasoning_effort: "x")'
    )
    assert caught.value.details[0] == problem


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_reasoning_after_a_prompt_that_ends_it_is_refused(prepared, name: str):
    files = file_of({"messages": asked(REASONED[0])})
    with pytest.raises(LoraError) as caught:
        prepared(MODELS[name].tokenizer(), files=files, template_variables=NO_THINKING)
    assert caught.value.details == (
        "train.jsonl:1: has reasoning, but the generation prompt ends the reasoning before the answer: "
        "change data.template_variables, or the row's chat_template_kwargs (enable_thinking), or remove the reasoning",
    )


def test_the_tag_in_place_of_omitted_reasoning_is_not_learnt():
    text = marked(MODELS["deepseek v3.1"].tokenizer(), asked(REASONED[0], REASONED[1]), thinking=True)
    assert text == (
        f"{DS_BOS}<｜User｜>q0<｜Assistant｜></think>[[4{DS_EOS}]]"
        f"<｜User｜>q1<｜Assistant｜><think>[[2+2</think>4{DS_EOS}]]"
    )


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3", "smollm3", "qwq"])
def test_blank_reasoning_is_no_reasoning(prepared, name: str):
    tokenizer = MODELS[name].tokenizer()
    rows = [{"messages": asked({"content": "4", **field})} for field in ({}, {"thinking": ""}, {"reasoning": "\n"})]
    first, *others = prepared(tokenizer, files=file_of(*rows)).train
    for row in others:
        assert (row.input_ids.tolist(), row.labels.tolist()) == (first.input_ids.tolist(), first.labels.tolist())


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek v3"])
def test_a_template_that_omits_the_results_of_tools_is_refused(prepared, name: str):
    chat = [
        *asked("<tool_call>{}</tool_call>"),
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "4"},
    ]
    with pytest.raises(LoraError) as caught:
        prepared(MODELS[name].tokenizer(), files=file_of({"messages": chat}))
    assert caught.value.details == ("train.jsonl:1: the chat template omits the result of a tool",)


def test_results_of_tools_may_be_written_in_another_form(prepared):
    written = {"tojson": "{{ message.content | tojson }}", "length": "{{ message.content | length }}"}
    chat = [*asked("<tool_call>{}</tool_call>"), {"role": "tool", "content": '"a"\n'}, *asked("4")[1:]]
    for form in written.values():
        tokenizer = MODELS["yi, hermes"].tokenizer()
        template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'tool' %}FORM"
        template += "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
        template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        tokenizer.chat_template = template.replace("FORM", form)
        assert len(prepared(tokenizer, files=file_of({"messages": chat})).train) == 1


def test_reasoning_of_earlier_turns_is_omitted_and_counted(prepared):
    chat = asked(REASONED[0], REASONED[3], "5", REASONED[1])
    tokenizer = MODELS["qwen3"].tokenizer()
    assert marked(tokenizer, chat) == "".join(
        Q.format(number) + f"[[{text}<|im_end|>]]\n"
        for number, text in enumerate(["4", "4", "5", "<think>\n2+2\n</think>\n\n4"])
    )
    data = prepared(tokenizer, files=file_of({"messages": chat}))
    assert "  2 earlier answers whose reasoning is omitted by the chat template" in data.ledger.table()
    assert not any("changed by the chat template" in line for line in data.ledger.table())
    multi = marked(MODELS["gpt-oss"].tokenizer(), asked(REASONED[1], REASONED[2]))
    assert re.findall(r"\[\[(.*?)\]\]", multi) == [
        "<|channel|>final<|message|>4<|end|>",
        "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
    ]


NO_THINKING = {"enable_thinking": False}


def test_an_answer_starts_after_the_prompt_of_a_server_with_these_variables(prepared):
    tokenizer = MODELS["qwen3"].tokenizer()
    empty = "<think>\n\n</think>\n\n"
    for variables in ({}, NO_THINKING, {"enable_thinking": True}):
        assert marked(tokenizer, asked("4"), **variables) == Q.format(0) + empty + "[[4<|im_end|>]]\n"
    files = file_of({"messages": asked("4")})
    row = prepared(tokenizer, files=files, template_variables=NO_THINKING).train[0]
    prompt = tokenizer.apply_chat_template(asked("4")[:1], add_generation_prompt=True, **NO_THINKING)["input_ids"]
    # A served prompt is a prefix of the row, and the first label is the token after it.
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert (row.labels != -100).argmax() == len(prompt)
    smollm3 = MODELS["smollm3"].tokenizer()
    start = "<|im_start|>system\nReasoning Mode: /no_think<|im_end|>\n"
    text = marked(smollm3, asked("4", "5"), **NO_THINKING)
    answers = [Q.format(n) + f"<think>\n\n</think>\n[[{n + 4}<|im_end|>]]\n" for n in (0, 1)]
    assert text == start + "".join(answers)


def test_variables_of_data_source_and_row(prepared):
    tokenizer = MODELS["smollm3"].tokenizer()
    rows = [
        {"messages": asked("4")},
        {"messages": asked("4"), "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": asked("4"), "chat_template_kwargs": '{"enable_thinking": null}'},
    ]
    files = file_of(*rows) | {"b.jsonl": json.dumps(rows[0])}
    train = [{"path": "train.jsonl"}, {"path": "b.jsonl", "template_variables": {"enable_thinking": True}}]
    data = prepared(tokenizer, files=files, train=train, template_variables=NO_THINKING)
    modes = [re.search(r"/\w+", tokenizer.decode(row.input_ids))[0] for row in data.train]
    assert modes == ["/no_think", "/think", "/no_think", "/think"]
    assert not any("columns not used" in line for line in data.ledger.table())


def test_rows_with_and_without_reasoning_are_told(prepared):
    data = prepared(
        MODELS["qwen3"].tokenizer(),
        files=file_of(*({"messages": asked(answer)} for answer in (REASONED[0], "5", REASONED[3]))),
    )
    assert data.ledger.table()[2:4] == [
        "  2 rows with reasoning in the last answer, mixed with 1 without",
        "  1 answer without reasoning after an empty reasoning block of the chat template, which carries no loss: "
        "a server writes it in the prompt if reasoning is off (data.template_variables)",
    ]


WRONG_VARIABLES = {
    "unknown": (
        {"template_variables": {"enable_thinkin": False}},
        "data.template_variables: the tokenizer's chat template reads no variable enable_thinkin",
        "did you mean enable_thinking? it reads enable_thinking",
    ),
    "unknown in a source": (
        {"train": [{"path": "train.jsonl", "template_variables": {"thinking": True}}]},
        "data.train[0].template_variables: the tokenizer's chat template reads no variable thinking",
        "did you mean enable_thinking? it reads enable_thinking",
    ),
    "reserved": (
        {"template_variables": {"add_generation_prompt": True}},
        "data.template_variables: add_generation_prompt is set by the tool itself and cannot be changed",
        "remove it",
    ),
    "special token": (
        {"template_variables": {"bos_token": ""}},
        "data.template_variables: bos_token is set by the tool itself and cannot be changed",
        "remove it",
    ),
}


@pytest.mark.parametrize("case", WRONG_VARIABLES)
def test_a_variable_that_the_template_does_not_read_is_refused(prepared, case: str):
    section, message, hint = WRONG_VARIABLES[case]
    with pytest.raises(LoraError) as caught:
        prepared(MODELS["qwen3"].tokenizer(), files=file_of({"messages": asked("4")}), **section)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_bad_variables_of_a_row_are_bad_rows(prepared):
    rows = [
        {"messages": asked("4"), "chat_template_kwargs": kwargs}
        for kwargs in ({"thinking": False}, {"messages": []}, [1], "yes")
    ]
    rows.append({"messages": asked(REASONED[0]), "chat_template_kwargs": NO_THINKING})
    with pytest.raises(LoraError) as caught:
        prepared(MODELS["qwen3"].tokenizer(), files=file_of(*rows))
    # Rows that cannot be parsed are reported first.
    assert caught.value.details == (
        "train.jsonl:1: chat_template_kwargs: the chat template reads no variable thinking; did you mean "
        "enable_thinking? it reads enable_thinking",
        "train.jsonl:2: chat_template_kwargs: messages is set by the tool itself and cannot be changed; remove it",
        'train.jsonl:3: chat_template_kwargs: is a list, not an object such as {"enable_thinking": false}',
        "train.jsonl:4: chat_template_kwargs: is a string, but not valid JSON",
        "train.jsonl:5: has reasoning, but the generation prompt ends the reasoning before the answer: change "
        "data.template_variables, or the row's chat_template_kwargs (enable_thinking), or remove the reasoning",
    )


@pytest.mark.parametrize("flags", ["", "r", "l", "lr"])
@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte level", "sentencepiece"])
def test_white_space_that_control_tokens_swallow_is_not_learnt(prepared, flags: str, sentencepiece: bool):
    tokens = dict.fromkeys(("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), flags) | {"<|endoftext|>": ""}
    # Without `trim`, contents begin and end with the white space of the row.
    tokenizer = (
        MODELS["phi3"]
        ._replace(template=PHI3.replace(" | trim", ""), tokens=tokens, bos=None, sentencepiece=sentencepiece)
        .tokenizer()
    )
    answers = ["Hi", " Hi", "\n Hi", "Hi \n", "2+2 = 4\n\n- é 漢", "\tHi\n\n\n"]
    rows = [{"messages": asked(answer, answer)} for answer in answers]
    data = prepared(tokenizer, files=file_of(*rows))
    for answer, row, raw in zip(answers, data.train, rows, strict=True):
        assert row.input_ids.tolist() == tokenizer.apply_chat_template(raw["messages"])["input_ids"]
        texts = ["".join(text.split()) for text in supervised_texts(row, tokenizer)]
        assert texts == ["".join((answer + "<|end|>").split())] * 2
        assert tokenizer.eos_token_id not in row.labels


def test_the_date_is_that_of_the_run(prepared, monkeypatch: pytest.MonkeyPatch):
    tokenizer = MODELS["granite3"].tokenizer()
    files = file_of({"messages": asked("4")})
    first, again, other = (
        prepared(tokenizer, files=files, template_date=day) for day in ("2026-01-05", "2026-01-05", "2026-02-11")
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert "February 11, 2026" in tokenizer.decode(other.train[0].input_ids)
    # A recipe without a date has today's, which its run records.
    today = prepared(tokenizer, files=files).train[0]
    written = tokenizer.apply_chat_template(asked("4"))["input_ids"]
    assert today.input_ids.tolist() == written


def test_the_saved_template_sets_variables_that_a_server_does_not_pass():
    tokenizer = MODELS["qwen3"].tokenizer()
    spec = DataSpec.model_validate({"train": "x", "template_variables": NO_THINKING})
    question = asked("4")[:1]
    expected = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **NO_THINKING)
    default = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = saved_template(spec, tokenizer)
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == expected != default
    on = {"enable_thinking": True}
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **on) == default
    values = {"a": "é\n\"'\\", "b": [1, None, {"x": 1.5}], "c": None, "d": True}
    written = "{{ [a, b, c, d] | tojson }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.chat_template = with_defaults(written, values)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "!"}], tokenize=False)
    assert json.loads(text.removesuffix("!")) == list(values.values())


def test_sources_with_different_variables_leave_the_saved_template_as_it_is():
    tokenizer = MODELS["qwen3"].tokenizer()
    sources = [{"path": "a", "template_variables": NO_THINKING}, {"path": "b"}]
    spec = DataSpec.model_validate({"train": sources})
    assert saved_template(spec, tokenizer) == tokenizer.chat_template
    shared = DataSpec.model_validate({"train": sources[:1]})
    assert saved_template(shared, tokenizer) != tokenizer.chat_template
