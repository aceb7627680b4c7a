"""The largest text of a row: a longer one takes minutes, and all memory, to tokenize. No tokenizer, no torch."""

from lora_cli.data.conversation import Conversation
from lora_cli.data.formats import ClassificationExample, Document, Example, PromptCompletion, TaggingExample, TokenIds
from lora_cli.data.records import BadRow
from lora_cli.data.segments import Segments

MAX_TEXT = 1 << 24  # characters of a row: more than ten times the longest context of a model
MAX_WORD = 1 << 22  # characters without white space: tokenizers merge the parts of a word in more than linear time
SPLIT_HINT = "split it into several rows, or leave it out: data.on_bad_row: skip"


def check_size(example: Example) -> None:
    """Check the length of an example's texts and of their words.

    Raises:
        BadRow: they are too long.
    """
    if (size := text_size(example)) <= MAX_WORD:
        return
    if size > MAX_TEXT:
        problem = f"has {size:,} characters, more than a row may have ({MAX_TEXT:,})"
        raise BadRow("too long text", problem, hint=SPLIT_HINT)
    longest = max((len(word) for text in _texts(example) for word in text.split()), default=0)
    if longest > MAX_WORD:
        problem = f"has {longest:,} characters without white space, more than a word may have ({MAX_WORD:,})"
        raise BadRow("too long word", problem, hint=SPLIT_HINT)


def text_size(example: Example) -> int:
    """Return the characters of an example's texts, or its token ids."""
    return len(example.input_ids) if isinstance(example, TokenIds) else sum(map(len, _texts(example)))


def _texts(example: Example) -> list[str]:
    match example:
        case Conversation():
            return [value for message in example.messages for value in message.values() if isinstance(value, str)]
        case PromptCompletion(prompt, completion):
            return [prompt, completion]
        case ClassificationExample(text, pair, _):
            return [text, pair or ""]
        case TaggingExample(words, _):
            return words
        case Document(text):
            return [text]
        case Segments():
            return [example.text]
        case _:
            return []
