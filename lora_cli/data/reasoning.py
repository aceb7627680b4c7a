"""Reasoning of an answer (`reasoning_content`, `thinking`, `<think>...</think>`), in the form that a template reads.

transformers gives the three fields to a template under the names that templates read. A template without such a field
gets the reasoning at the start of the content, between `<think>` and `</think>`. Pure: no tokenizer, no torch.
"""

import re
from typing import NamedTuple

from lora_cli.data.conversation import Message

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


def split_reasoning(message: Message) -> Answer:
    """Return the reasoning of an assistant message, and its content without it."""
    content = message["content"]
    for field in FIELDS:
        value = message.get(field)
        if isinstance(value, str) and value.strip():
            return Answer(value, content, inline=False)
    if CLOSE in content and (match := INLINE.match(content)) and match["answer"].strip():
        # Line breaks belong to the tags, as in the templates that split the content.
        reasoning = match["opened"] if match["opened"] is not None else match["bare"]
        return Answer(reasoning.strip("\n"), match["answer"].lstrip("\n"), inline=True)
    return Answer("", content, inline=False)


def with_field(message: Message) -> Message:
    """Return an assistant message with its reasoning in a field."""
    answer = split_reasoning(message)
    if not answer.inline:
        return message
    return {**message, "content": answer.content, FIELDS[0]: answer.reasoning}


def with_inline(message: Message) -> Message:
    """Return an assistant message with its reasoning in its content."""
    answer = split_reasoning(message)
    if not answer.reasoning.strip() or answer.inline:
        return message
    plain = {key: value for key, value in message.items() if key not in FIELDS}
    return {**plain, "content": block(answer.reasoning) + answer.content}


def block(reasoning: str) -> str:
    """Return the block of reasoning that precedes an answer, as the models of this form write it."""
    return f"{OPEN}\n{reasoning.strip(chr(10))}\n{CLOSE}\n\n"
