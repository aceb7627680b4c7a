"""Dataset formats (alpaca, sharegpt, messages, ...): parse one row of each. Pure: no tokenizer, no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.conversation import Conversation, Message, check_conversation
from lora_cli.data.loss_flags import flags_of
from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.records import BadRow
from lora_cli.data.segments import SEGMENTS_SUMMARY, Segments, parse_segments
from lora_cli.data.turns import TurnOptions, arrange_turns
from lora_cli.errors import LoraError
from lora_cli.recipe.tasks import TASK_FORMATS, FormatName, TaskName

DETECTION_ROWS = 32  # valid rows from which `format: auto` detects the format


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


def parse_messages(row: RawRow) -> Conversation:
    """Parse the chat format of OpenAI and transformers.

    Raises:
        BadRow: the conversation is invalid.
    """
    return check_conversation(_list(row, "messages"), field="messages", tools=row.get("tools"))


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def parse_sharegpt(row: RawRow) -> Conversation:
    """Parse turns of `from` and `value`; function calls and observations become tool calls and tool results.

    Raises:
        BadRow: the conversation is invalid.
    """
    turns = [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(_list(row, "conversations"))]
    if system := _optional_text(row, "system"):
        turns.insert(0, {"role": "system", "content": system})
    return check_conversation(turns, field="conversations", tools=row.get("tools"))


def _sharegpt_turn(turn: object, location: str) -> Message:
    if not isinstance(turn, dict):
        problem = f"is {json_type(turn)}, not an object with from and value"
        raise BadRow("message is not an object", problem, field=location)
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        problem = f"{quote(speaker)} is not a role: known roles are human, gpt, system, ..."
        raise BadRow("unknown role", "is missing" if speaker is None else problem, field=f"{location}.from")
    if not isinstance(value, str | list):
        raise BadRow("content is not text", f"is {json_type(value)}, not a string", field=f"{location}.value")
    message = {**flags_of(turn), "role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker not in {"function_call", "tool_call"}:
        return message
    calls = parse_json_field(value, field=f"{location}.value") if isinstance(value, str) else value
    return {**message, "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def parse_alpaca(row: RawRow) -> Conversation:
    """Parse an instruction with optional input, system message and earlier turns.

    Raises:
        BadRow: a field is missing or invalid, or the output is empty.
    """
    # Instruction and input are joined by one line break, as in LLaMA-Factory.
    instruction = [_text(row, "instruction"), _optional_text(row, "input")]
    turns: list[Message] = []
    if system := _optional_text(row, "system"):
        turns.append({"role": "system", "content": system})
    for index, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("wrong history", "is not a pair of question and answer", field=f"history[{index}]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    output = _text(row, "output")
    if not output.strip():
        raise BadRow("nothing to learn", "is empty: there is no answer to learn from", field="output")
    turns.append({"role": "user", "content": "\n".join(part for part in instruction if part)})
    turns.append({"role": "assistant", "content": output})
    return check_conversation(turns, field="history")


def parse_prompt_completion(row: RawRow) -> PromptCompletion | Conversation:
    """Parse two literal texts, or two lists of messages that form one conversation.

    Raises:
        BadRow: a field is not text, the completion is empty, or the conversation is invalid.
    """
    prompt, completion = _not_null(row, "prompt"), _not_null(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(turn, dict) and turn.get("role") != "assistant" for turn in completion[:1]):
            raise BadRow("wrong role order", "does not start with the role assistant", field="completion")
        return check_conversation([*prompt, *completion], field="prompt + completion", tools=row.get("tools"))
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


# `format: auto` tries them in this order: a match of more columns is more certain.
FORMATS: dict[FormatName, Format] = {
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "system", "history"),
        parse_alpaca,
        "instruction, optional input, output; becomes a conversation",
    ),
    "prompt-completion": Format(
        ("prompt", "completion"),
        ("tools",),
        parse_prompt_completion,
        "strings: literal text and EOS, no chat template; lists of messages: a conversation",
    ),
    "messages": Format(("messages",), ("tools",), parse_messages, "messages with role and content, optional tools"),
    "sharegpt": Format(("conversations",), ("system", "tools"), parse_sharegpt, "conversations of from and value"),
    "tokens": Format(("input_ids",), ("labels", "attention_mask"), parse_tokens, "input_ids, optional labels"),
    "text": Format(("text",), (), parse_text, "a document: every token carries loss, EOS at its end"),
    "segments": Format(("segments",), (), lambda row: parse_segments(_list(row, "segments")), SEGMENTS_SUMMARY),
    "classification": Format(
        ("text", "label"),
        ("text_pair",),
        parse_classification,
        "text, optional text_pair, and a label, number or list of labels",
    ),
    "tagging": Format(("tokens", "tags"), (), parse_tagging, "a list of words, and a list with the tag of each"),
}


# Examples of `data.columns`, for messages.
COLUMN_EXAMPLES: dict[TaskName, str] = {
    "causal-lm": "{prompt: question, completion: answer}",
    "seq-cls": "{text: sentence, label: class}",
    "token-cls": "{tokens: words, tags: ner_tags}",
    "seq2seq-lm": "{prompt: document, completion: summary}",
}


def rename_columns(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return `row` with its columns renamed to those of the format; `columns` maps format column to file column."""
    if not columns:
        return row
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{name: row[column] for name, column in columns.items() if column in row}}


def parse_row(row: RawRow, name: FormatName, turns: TurnOptions) -> Example:
    """Parse `row` as the format `name`.

    Raises:
        BadRow: a required column is missing, its content is invalid, or its turns are in a wrong order.
    """
    format_ = FORMATS[name]
    for column in format_.required:
        if column not in row:
            raise BadRow("missing field", f"is missing; the row has {column_names(row)}", field=column)
    example = format_.parse(row)
    return arrange_turns(example, turns) if isinstance(example, Conversation) else example


class DetectedFormat(NamedTuple):
    """The format of a source and the reason for it."""

    name: FormatName
    why: str
    columns: dict[str, str]  # column names to change, in the form of data.columns


def detect_format(locations: Sequence[str], rows: Sequence[RawRow], task: TaskName = "causal-lm") -> DetectedFormat:
    """Return the one format of the task that fits the first rows of a source; `locations` names the rows in messages.

    Raises:
        LoraError: no format fits, or the rows have different formats.
    """
    detected = [
        (location, row, _detect_one(location, row, task)) for location, row in zip(locations, rows, strict=True)
    ]
    # Rows without a known format are ignored here: they are reported as bad rows when they are parsed.
    known = [(location, row, name) for location, row, name in detected if name is not None]
    if not known:
        raise LoraError(
            f"{locations[0]}: no known format has these columns: {column_names(rows[0])}",
            hint=f"map them with data.columns, for example {COLUMN_EXAMPLES[task]}",
        )
    first_location, row, first = known[0]
    for location, _, name in known:
        if name != first:
            raise LoraError(
                f"data: rows have different formats: {first_location} looks like {first}, {location} like {name}",
                hint="set data.format, or list the rows of each format as a separate source",
            )
    if first == "messages" and "messages" not in row:
        return DetectedFormat("messages", "role and content in column conversations", {"messages": "conversations"})
    present = [column for column in (*FORMATS[first].required, *FORMATS[first].optional) if column in row]
    return DetectedFormat(first, f"its rows have {' + '.join(present)}", {})


def _detect_one(location: str, row: RawRow, task: TaskName) -> FormatName | None:
    if task == "causal-lm" and "chosen" in row and "rejected" in row:
        raise LoraError(
            f"{location}: is a preference row (chosen and rejected answers), which `task: causal-lm` does not support",
            hint="to train on the chosen answers: format: prompt-completion, columns: {completion: chosen}",
        )
    turns = row.get("conversations") if task == "causal-lm" else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return "messages"
    candidates = (name for name in FORMATS if name in TASK_FORMATS[task])
    return next((name for name in candidates if all(c in row for c in FORMATS[name].required)), None)


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
