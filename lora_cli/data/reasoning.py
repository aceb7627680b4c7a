"""Reasoning of an answer (`reasoning_content`, `thinking`, `<think>...</think>`), in the form that a template reads.

transformers gives the three fields to a template under the names that templates read. A template without such a field
gets the reasoning at the start of the content, between `<think>` and `</think>`. Pure: no tokenizer, no torch.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_cli.data.readers import json_type
from lora_cli.data.records import BadRow

FIELDS = ("reasoning_content", "thinking", "reasoning")  # in the order in which transformers reads them
OPEN, CLOSE = "<think>", "</think>"
# A model's own output lacks the opening tag if its generation prompt writes it.
INLINE = re.compile(rf"\s*(?:{OPEN}(?P<opened>.*?)|(?P<bare>.*?)\n){CLOSE}(?P<answer>.*)", re.DOTALL)
# Markup of an empty block of reasoning, or of the end of one: `<think>\n\n</think>\n\n`, `[THINK][/THINK]`, `</think>`.
EMPTY_BLOCK = re.compile(r"\s*(?:[<\[][^<>\[\]/]+[>\]]\s*)?[<\[]/[^<>\[\]]+[>\]]\s*")
# The start of a block: `<think>\n`.
OPEN_BLOCK = re.compile(r"\s*<(?P<tag>\w+)>\s*")


class Answer(NamedTuple):
    """An assistant message, with its reasoning apart."""

    reasoning: str  # "" if it has none
    content: str  # without the reasoning
    inline: bool  # the message writes the reasoning in its content


def split_reasoning(message: Mapping[str, Any]) -> Answer:
    """Return the reasoning of an assistant message, and its content without it."""
    content = message["content"]
    for field in FIELDS:
        value = message.get(field)
        if isinstance(value, str) and value.strip():
            return Answer(value, content, inline=False)
    if CLOSE in content and (match := INLINE.match(content)) and (match["answer"].strip() or message.get("tool_calls")):
        # Line breaks belong to the tags, as in the templates that split the content.
        reasoning = match["opened"] if match["opened"] is not None else match["bare"]
        return Answer(reasoning.strip("\n"), match["answer"].lstrip("\n"), inline=True)
    return Answer("", content, inline=False)


def with_one_reasoning(message: dict[str, Any], location: str) -> dict[str, Any]:
    """Return an assistant message without blank reasoning, and check that it has its reasoning once.

    A template writes one reasoning, and would omit or repeat others; some write an empty block for a blank one.

    Args:
        message: its fields, without nulls, with the content as one text.
        location: of the message, for errors.

    Raises:
        BadRow: a field is not text, two fields have different texts, or a field and the content have one each.
    """
    fields = [field for field in FIELDS if message.get(field) is not None]
    for field in fields:
        if not isinstance(message[field], str):
            problem = f"is {json_type(message[field])}, not a string"
            raise BadRow("reasoning is not text", problem, field=f"{location}.{field}")
    if not fields:
        return message
    filled = [field for field in fields if message[field].strip()]
    for field in filled[1:]:
        if message[field].strip() != message[filled[0]].strip():
            raise BadRow("two reasonings", f"{filled[0]} and {field} differ: keep one", field=location)
    plain = {key: value for key, value in message.items() if key not in FIELDS}
    if filled and split_reasoning(plain).reasoning.strip():
        problem = f"has reasoning in {filled[0]} and, between {OPEN} and {CLOSE}, in its content: keep one"
        raise BadRow("two reasonings", problem, field=location)
    return {key: value for key, value in message.items() if key not in FIELDS or key in filled}


def with_field(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant message with its reasoning in a field."""
    answer = split_reasoning(message)
    if not answer.inline:
        return message
    return {**message, "content": answer.content, FIELDS[0]: answer.reasoning}


def with_inline(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant message with its reasoning in its content."""
    answer = split_reasoning(message)
    if not answer.reasoning.strip() or answer.inline:
        return message
    plain = {key: value for key, value in message.items() if key not in FIELDS}
    return {**plain, "content": block(answer.reasoning) + answer.content}


def block(reasoning: str) -> str:
    """Return the block of reasoning that precedes an answer, as the models of this form write it."""
    return f"{OPEN}\n{reasoning.strip(chr(10))}\n{CLOSE}\n\n"
