"""The largest text of a row: a longer one takes minutes, and all memory, to tokenize. No tokenizer, no torch."""

from typing import Any

from lora_cli.data.conversation import Conversation
from lora_cli.data.formats import ClassificationExample, Document, Example, PromptCompletion, TaggingExample, TokenIds
from lora_cli.data.records import BadRow

MAX_TEXT = 1 << 24  # characters of a row: more than ten times the longest context of a model
SPLIT_HINT = "split it into several rows, or leave it out: data.on_bad_row: skip"


def check_size(example: Example) -> None:
    """Check the length of an example's texts.

    Raises:
        BadRow: they are too long.
    """
    if (size := text_size(example)) > MAX_TEXT:
        problem = f"has {size:,} characters, more than a row may have ({MAX_TEXT:,})"
        raise BadRow("too long text", problem, hint=SPLIT_HINT)


def text_size(example: Example) -> int:
    """Return the characters of an example's texts, or its token ids."""
    match example:
        case Conversation():
            return sum(_message_size(message) for message in example.messages)
        case PromptCompletion(prompt, completion):
            return len(prompt) + len(completion)
        case ClassificationExample(text, pair, _):
            return len(text) + len(pair or "")
        case TaggingExample(words, _):
            return sum(map(len, words))
        case TokenIds(ids, _):
            return len(ids)
        case Document(text):
            return len(text)
        case _:
            return len(example.text)


def _message_size(message: dict[str, Any]) -> int:
    return sum(len(value) for value in message.values() if isinstance(value, str))
