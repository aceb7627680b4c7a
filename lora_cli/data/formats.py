"""Dataset formats (alpaca, sharegpt, messages, ...): parse one row of each. Pure: no tokenizer, no torch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_cli.data.conversation import Conversation, Message, check_conversation
from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.records import BadRow
from lora_cli.data.segments import SEGMENTS_SUMMARY, Segments, parse_segments
from lora_cli.data.turns import TurnOptions, arrange_turns
from lora_cli.recipe.tasks import FormatName

MISSING = "missing field"  # the reason for a row without a column of its format


class PromptCompletion(NamedTuple):
    """Literal text without a chat template; only the completion carries loss."""

    prompt: str
    completion: str


class Document(NamedTuple):
    """A document; every token carries loss."""

    text: str


class TokenIds(NamedTuple):
    """A row that is tokenized already."""

    input_ids: list[int]
    labels: list[int] | None  # each -100 or the id at the same position; None: every token carries loss


Label = str | int | float | bool


class ClassificationExample(NamedTuple):
    """A text or a pair of texts, and its label."""

    text: str
    pair: str | None
    label: Label | list[Label]


class TaggingExample(NamedTuple):
    """Words and the label of each."""

    words: list[str]
    tags: list[Label]


Example = Conversation | PromptCompletion | Document | Segments | TokenIds | ClassificationExample | TaggingExample
RawRow = Mapping[str, Any]


class Format(NamedTuple):
    """One row format: its columns and its parser."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[RawRow], Example]
    summary: str
    messages: tuple[str, ...] = ()  # columns that contain messages, which are normalized before they are parsed


def parse_messages(row: RawRow) -> Conversation:
    """Parse the chat format of OpenAI and transformers.

    Raises:
        BadRow: the conversation is invalid.
    """
    return _parse_turns(row, "messages")


def parse_sharegpt(row: RawRow) -> Conversation:
    """Parse turns of `from` and `value`; function calls and observations become tool calls and tool results.

    Raises:
        BadRow: the conversation is invalid.
    """
    return _parse_turns(row, "conversations")


def _parse_turns(row: RawRow, column: str) -> Conversation:
    """Parse a column of messages, which are normalized (message_shapes.py), with optional columns system and tools."""
    turns = _list(row, column)
    system = _optional_text(row, "system")
    if system and turns and isinstance(turns[0], dict) and turns[0].get("role") in {"system", "developer"}:
        if turns[0].get("content") != system:
            problem = "differs from the system message that the conversation starts with"
            raise BadRow("two system messages", problem, field="system")
        system = ""
    return check_conversation(turns, field=column, tools=_tools(row), system=system)


def _tools(row: RawRow) -> object:
    """Return the tool schemas of a row; `functions` is their older name."""
    if row.get("tools") and row.get("functions"):
        raise BadRow("wrong tools", "the row has tools and functions", field="functions")
    return row.get("tools") or row.get("functions")


def parse_alpaca(row: RawRow) -> Conversation:
    """Parse an instruction with optional input, system message and earlier turns.

    Raises:
        BadRow: a field is missing or invalid, or the output is empty.
    """
    # Instruction and input are joined by one line break, as in LLaMA-Factory.
    instruction = [_text(row, "instruction"), _optional_text(row, "input")]
    return _parse_question(row, "\n".join(part for part in instruction if part), answer="output")


def parse_query_response(row: RawRow) -> Conversation:
    """Parse a query and its response with optional system message and earlier turns, as in ms-swift and ModelScope.

    Raises:
        BadRow: a field is missing or invalid, or the response is empty.
    """
    return _parse_question(row, _text(row, "query"), answer="response")


def _parse_question(row: RawRow, question: str, *, answer: str) -> Conversation:
    """Return the conversation of a question and its answer after the optional columns system and history."""
    turns: list[Message] = []
    for index, turn in enumerate(_list(row, "history") if row.get("history") else []):
        if isinstance(turn, dict):
            turns.append(turn)
        elif isinstance(turn, list) and len(turn) == 2:
            for number, text in enumerate(turn):
                if not isinstance(text, str):
                    problem = f"is {json_type(text)}, not a string"
                    raise BadRow("not a string", problem, field=f"history[{index}][{number}]")
            if not turn[1].strip():
                problem = "is empty: there is no answer to learn from"
                raise BadRow("nothing to learn", problem, field=f"history[{index}][1]")
            turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            raise BadRow("wrong history", "is not a pair of question and answer", field=f"history[{index}]")
    output = _text(row, answer)
    if not output.strip():
        raise BadRow("nothing to learn", "is empty: there is no answer to learn from", field=answer)
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": output})
    return check_conversation(turns, field="history", tools=_tools(row), system=_optional_text(row, "system"))


def parse_prompt_completion(row: RawRow) -> PromptCompletion | Conversation:
    """Parse two literal texts, or two lists of messages that form one conversation.

    Raises:
        BadRow: a field is not text, the completion is empty, or the conversation is invalid.
    """
    prompt, completion = _not_null(row, "prompt"), _not_null(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(turn, dict) and turn.get("role") != "assistant" for turn in completion[:1]):
            raise BadRow("wrong role order", "does not start with the role assistant", field="completion")
        return check_conversation([*prompt, *completion], field="prompt + completion", tools=_tools(row))
    if _tools(row):
        raise BadRow(
            "wrong tools", "are for conversations: write prompt and completion as lists of messages", field="tools"
        )
    literal = PromptCompletion(_text(row, "prompt"), _text(row, "completion"))
    if not literal.completion.strip():
        raise BadRow("nothing to learn", "is empty: there is nothing to learn from", field="completion")
    return literal


def parse_text(row: RawRow) -> Document:
    """Parse a document.

    Raises:
        BadRow: it is empty or not a string.
    """
    text = _text(row, "text")
    if not text.strip():
        raise BadRow("nothing to learn", "is empty", field="text")
    return Document(text)


def parse_tokens(row: RawRow) -> TokenIds:
    """Parse token ids; if the row has labels, only they decide which tokens carry loss.

    Raises:
        BadRow: ids, labels and attention mask do not match, or there are fewer than two ids.
    """
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if row.get("labels") is not None else None
    if labels is not None:
        if len(labels) != len(ids):
            problem = f"has {len(labels)} entries, but input_ids has {len(ids)}"
            raise BadRow("labels do not match input_ids", problem, field="labels")
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in {-100, token}:
                problem = f"is {label}: a label must be -100 or the id at the same position, here {token} (not shifted)"
                raise BadRow("labels do not match input_ids", problem, field=f"labels[{index}]")
    if row.get("attention_mask") is not None:
        mask = _integers(row, "attention_mask")
        if mask != [1] * len(ids):
            raise BadRow("masked tokens", "is not all ones: remove the padding", field="attention_mask")
    if len(ids) < 2:
        raise BadRow("nothing to learn", "has fewer than 2 ids: there is no next token to predict", field="input_ids")
    return TokenIds(ids, labels)


def parse_classification(row: RawRow) -> ClassificationExample:
    """Parse a text, an optional second text, and a label: a name or number, or a list of these.

    Raises:
        BadRow: the text is empty, or the label is missing or invalid.
    """
    text, label = _text(row, "text"), _not_null(row, "label")
    if not text.strip():
        raise BadRow("empty text", "is empty", field="text")
    if isinstance(label, list):
        for index, each in enumerate(label):
            _check_label(each, f"label[{index}]")
    else:
        _check_label(label, "label")
    return ClassificationExample(text, _text(row, "text_pair") if row.get("text_pair") is not None else None, label)


def parse_tagging(row: RawRow) -> TaggingExample:
    """Parse words and one tag for each.

    Raises:
        BadRow: a word or tag is invalid, or their numbers differ.
    """
    words, tags = _list(row, "tokens"), _list(row, "tags")
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            problem = "is empty" if isinstance(word, str) else f"is {json_type(word)}, not a string"
            raise BadRow("not a word", problem, field=f"tokens[{index}]")
    if len(words) != len(tags):
        problem = f"has {len(tags)} entries, but tokens has {len(words)}"
        raise BadRow("tags do not match tokens", problem, field="tags")
    if not words:
        raise BadRow("nothing to learn", "is empty", field="tokens")
    for index, tag in enumerate(tags):
        _check_label(tag, f"tags[{index}]")
    return TaggingExample(words, tags)


def _check_label(value: object, field: str) -> None:
    if not isinstance(value, str | int | float):  # a bool is an int
        raise BadRow("not a label", f"is {json_type(value)}, not a name or number", field=field)
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        raise BadRow("no label", f"is {value}, which marks a row without label", field=field)
    if value == "":
        raise BadRow("no label", "is empty", field=field)


TOOLS = ("tools", "functions")

# `format: auto` tries them in this order: a match of more columns is more certain.
FORMATS: dict[FormatName, Format] = {
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "system", "history", *TOOLS),
        parse_alpaca,
        "instruction, optional input, output; becomes a conversation",
        messages=("history",),
    ),
    "prompt-completion": Format(
        ("prompt", "completion"),
        TOOLS,
        parse_prompt_completion,
        "strings: literal text and EOS, no chat template; lists of messages: a conversation",
        messages=("prompt", "completion"),
    ),
    "messages": Format(
        ("messages",),
        ("system", *TOOLS),
        parse_messages,
        "messages with role and content, optional tools",
        messages=("messages",),
    ),
    "sharegpt": Format(
        ("conversations",),
        ("system", *TOOLS),
        parse_sharegpt,
        "conversations of from and value",
        messages=("conversations",),
    ),
    "tokens": Format(("input_ids",), ("labels", "attention_mask"), parse_tokens, "input_ids, optional labels"),
    "text": Format(("text",), (), parse_text, "a document: every token carries loss, EOS at its end"),
    "query-response": Format(
        ("query", "response"),
        ("system", "history", *TOOLS),
        parse_query_response,
        "query, response, optional history of earlier turns; becomes a conversation",
        messages=("history",),
    ),
    "segments": Format(("segments",), (), lambda row: parse_segments(_list(row, "segments")), SEGMENTS_SUMMARY),
    "classification": Format(
        ("text", "label"),
        ("text_pair",),
        parse_classification,
        "text, optional text_pair, and a label, number or list of labels",
    ),
    "tagging": Format(("tokens", "tags"), (), parse_tagging, "a list of words, and a list with the tag of each"),
}


def parse_row(row: RawRow, name: FormatName, turns: TurnOptions) -> Example:
    """Parse `row` as the format `name`.

    Raises:
        BadRow: a required column is missing, its content is invalid, or its turns are in a wrong order.
    """
    format_ = FORMATS[name]
    for column in format_.required:
        if column not in row:
            raise BadRow(MISSING, f"is missing; the row has {column_names(row)}", field=column)
    example = format_.parse(row)
    return arrange_turns(example, turns) if isinstance(example, Conversation) else example


def column_names(row: RawRow) -> str:
    """Return the column names of a row for a message, at most eight of them."""
    names = [quote(name) if not name.isidentifier() else name for name in row]
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "no fields"


def _not_null(row: RawRow, field: str) -> Any:
    value = row[field]
    if value is None:
        raise BadRow("null field", "is null", field=field)
    return value


def _text(row: RawRow, field: str) -> str:
    value = _not_null(row, field)
    if not isinstance(value, str):
        raise BadRow("not a string", f"is {json_type(value)}, not a string", field=field)
    return value


def _optional_text(row: RawRow, field: str) -> str:
    return "" if row.get(field) is None else _text(row, field)


def _list(row: RawRow, field: str) -> list[Any]:
    value = _not_null(row, field)
    if isinstance(value, str):
        # Tables (.csv, many .parquet files) store lists as JSON text.
        value = parse_json_field(value, field=field)
    if not isinstance(value, list):
        raise BadRow("not a list", f"is {json_type(value)}, not a list", field=field)
    return value


def _integers(row: RawRow, field: str) -> list[int]:
    values = _list(row, field)
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRow("not a token id", f"is {json_type(value)}, not an integer", field=f"{field}[{index}]")
    return values
