"""Rows as other tools take them: the text and labels of each to the letter, or the line that refuses it."""

import json
import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.examples import check_rows
from lora_cli.data.message_shapes import MessageNames, normalize_messages
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.row_shapes import REFUSED, SHAPES, Refused
from tests.inputs.tiny_tokenizers import build, supervised_texts

# Tools and calls are written as JSON; the tokens of a turn are replaced in `shown`.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def with_tools():
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=TEMPLATE)


def shown(row, tokenizer) -> str:
    """Return the row's text, the tokens with loss in [[ ]], and `role:` in place of the tokens around a turn."""
    parts: list[str] = []
    inside = False
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if (label != -100) != inside:
            parts.append("[[" if label != -100 else "]]")
            inside = label != -100
        parts.append(tokenizer.decode([token], skip_special_tokens=False))
    text = "".join(parts).replace("<|im_end|>]]\n", "]] ").replace("<|im_start|>assistant\n", "")
    return re.sub(r"<\|im_start\|>(\w+)\n", r"\1:", text).replace("<|im_end|>\n", " ").strip()


def file_of(*rows: object) -> dict[str, str]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_becomes_exactly_this_text_with_these_labels(prepared, with_tools, name: str):
    row, text, section, unread = SHAPES[name]
    data = prepared(with_tools, files=file_of(row), **section)
    assert shown(data.train[0], with_tools) == text
    assert [line.strip() for line in data.ledger.table() if "not used" in line] == list(unread)


def error_of(case: Refused, run) -> list[str]:
    with pytest.raises(LoraError) as caught:
        run()
    assert caught.value.exit_code == 2
    first, *_ = [*caught.value.details, caught.value.message]
    assert "\n" not in first
    return [first.removeprefix("train.jsonl:1: "), str(caught.value.hint)]


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_of_another_kind_is_refused_by_name(prepared, with_tools, tmp_path, name: str):
    case = REFUSED[name]
    files = file_of(case.row)
    assert error_of(case, lambda: prepared(with_tools, files=files, **case.section)) == [case.line, case.hint]
    spec = DataSpec.model_validate({"train": "train.jsonl", "eval": None, **case.section})
    assert error_of(case, lambda: check_rows(spec, "causal-lm", lambda line: None)) == [case.line, case.hint]


def test_bad_answers_are_skipped_and_counted_on_purpose(prepared, chatml):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(6)]
    data = prepared(chatml, files=file_of(*rows), on_bad_row="skip", max_loss=1.0)
    assert [row.where for row in data.train] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:5"]
    assert data.ledger.entries[0].tally.dropped == {"bad answer": 3}
    plain = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    left_out = prepared(chatml, files=file_of(*rows), columns={"label": None})
    assert left_out.fingerprint == prepared(chatml, files=file_of(*plain)).fingerprint


def test_too_many_bad_rows_are_refused_with_and_without_model(prepared, chatml):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i != 0} for i in range(5)]
    bad = [{**row, "label": False} for row in rows]
    for files, section, message in (
        (file_of(*rows), {}, r"1 of 5 rows are dropped \(20.0%\), more than data.max_loss allows \(10.0%\)"),
        (file_of(*bad), {"max_loss": 1.0}, "data.train: no rows are left"),
    ):
        section = {"on_bad_row": "skip", "eval": None, **section}
        with pytest.raises(LoraError, match=message):
            prepared(chatml, files=files, **section)
        with pytest.raises(LoraError, match=message):
            check_rows(DataSpec(train="train.jsonl", **section), "causal-lm", lambda line: None)


def test_the_hint_for_unknown_columns_follows_the_chat_template(prepared, chatml, base):
    files = file_of({"Question": "Hello", "context": "you", "Answer": " Hi", "id": 1})
    hints = {}
    for name, tokenizer in {"chatml": chatml, "base": base}.items():
        with pytest.raises(LoraError) as caught:
            prepared(tokenizer, files=files)
        hints[name] = caught.value.hint
    assert hints["chatml"] == (
        "write format: alpaca, columns: {instruction: Question, output: Answer, input: context}, "
        "which keeps the model's chat template"
    )
    assert hints["base"] == (
        "write format: prompt-completion, columns: {prompt: Question, completion: Answer}: "
        "there is no chat template, so the texts are joined as they are"
    )
    columns = {"instruction": "Question", "output": "Answer", "input": "context"}
    data = prepared(chatml, files=files, format="alpaca", columns=columns)
    assert shown(data.train[0], chatml) == "user:Hello\nyou [[ Hi]]"
    data = prepared(
        base, files=files, format="prompt-completion", columns={"prompt": "Question", "completion": "Answer"}
    )
    assert supervised_texts(data.train[0], base) == [" Hi</s>"]


@pytest.mark.parametrize("written", ["tools[:1]", "[]"])
def test_a_tool_that_the_template_omits_is_refused(prepared, written: str):
    template = TEMPLATE.replace("for tool in tools", f"for tool in {written}")
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=template)
    # The name of the second tool is in a call, so the rendering contains it, but not its schema.
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "second", "arguments": {}}]}
    messages = [{"role": "user", "content": "Hi"}, call]
    row = {"messages": messages, "tools": [{"name": "first", "parameters": {}}, {"name": "second", "parameters": {}}]}
    with pytest.raises(LoraError) as caught:
        prepared(tokenizer, files=file_of(row))
    if written == "[]":
        assert caught.value.message == "data: rows have tools, but the tokenizer's chat template ignores them"
    else:
        assert caught.value.details == ("train.jsonl:1: tools: the chat template omits the tool second",)


texts = st.text("ab \n", min_size=1, max_size=5)
calls = st.fixed_dictionaries(
    {"name": texts, "arguments": st.dictionaries(texts, texts | st.integers(), max_size=2)},
).map(lambda function: {"type": "function", "function": function})
standard = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": texts})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}, optional={"tool_calls": st.lists(calls)}),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(messages=standard)
def test_messages_in_the_form_of_chat_templates_are_unchanged(messages):
    normalized = normalize_messages(messages, field="messages", names=MessageNames())
    assert normalized.messages == messages
    assert [origin.position for origin in normalized.origins] == list(range(len(messages)))
    renamed = [
        {"who": m["role"].upper(), "said": m["content"], **{k: m[k] for k in m if k == "tool_calls"}} for m in messages
    ]
    names = MessageNames({"role": "who", "content": "said"}, {"USER": "user"})
    assert normalize_messages(renamed, field="messages", names=names).messages == messages


KEYS = st.sampled_from(
    [
        *("role", "from", "content", "value", "text", "parts", "type"),
        *("tool_calls", "function_call", "function", "name", "arguments", "input", "id"),
        *(
            "tool_use_id",
            "thinking",
            "functionCall",
            "functionResponse",
            "function_declarations",
            "parameters",
            "input_schema",
        ),
        *("properties", "required_parameters", "api_name", "weight", "label", "images", "rejected"),
        *("chosen", "labels", "loss_mask"),
    ]
)
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "tool",
        "tool_call",
        "gpt",
        "text",
        "tool_use",
        "tool_result",
        "function",
        "thinking",
        "x",
        "",
    ]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 2) | WORDS | st.just('{"name": "f"}'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
messages_like = st.lists(st.dictionaries(KEYS, anything, max_size=4) | anything, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    row=st.dictionaries(KEYS, anything, max_size=2),
    messages=messages_like,
    tools=anything,
    name=st.sampled_from(["messages", "sharegpt", "query-response", "prompt-completion", "alpaca"]),
)
def test_no_row_is_a_traceback(tmp_path_factory, row, messages, tools, name):
    columns = {"messages": messages, "conversations": messages, "history": messages, "prompt": messages[:1]}
    texts = {"completion": messages[1:], "query": "q", "response": "r", "instruction": "i", "output": "o"}
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text(json.dumps({**row, **columns, **texts, "tools": tools}))
    spec = DataSpec.model_validate({"train": str(path), "eval": None, "format": name})
    with suppress(LoraError):
        check_rows(spec, "causal-lm", lambda line: None)
