"""Rows as other tools take them: the text and labels of each to the letter, or the line that refuses it."""

import json
import re

import pytest

from lora_cli.data.examples import check_rows
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.inputs.row_shapes import REFUSED, SHAPES, Refused
from tests.inputs.tiny_tokenizers import build

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
