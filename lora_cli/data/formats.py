"""Turn one dataset row into a conversation, a completion, a text, tokens or labels. Pure: no tokenizer, no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.conversation import Conversation, Message, check_conversation
from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError
from lora_cli.recipe.tasks import TASK_FORMATS, FormatName, TaskName

DETECTION_ROWS = 32  # rows that `auto` looks at before it says what they are


class PromptCompletion(NamedTuple):
    """Literal text without a chat template: the prompt is read, the completion learnt."""

    prompt: str
    completion: str


class Document(NamedTuple):
    """A document, learnt as a whole."""

    text: str


class TokenIds(NamedTuple):
    """Ready token ids."""

    input_ids: list[int]
    labels: list[int] | None  # each -100 or the id at its place; None: everything is learnt


Label = str | int | float | bool


class ClassificationExample(NamedTuple):
    """A text, or two, and what it is."""

    text: str
    pair: str | None
    label: Label | list[Label]


class TaggingExample(NamedTuple):
    """Words, each with what it is."""

    words: list[str]
    tags: list[Label]


Example = Conversation | PromptCompletion | Document | TokenIds | ClassificationExample | TaggingExample
RawRow = Mapping[str, Any]


class Format(NamedTuple):
    """One row format: its columns, and the function that reads them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[RawRow], Example]
    summary: str


def parse_messages(row: RawRow) -> Conversation:
    """The chat format of OpenAI and transformers."""
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
    """Turns of `from` and `value`; function calls and observations become tool calls and results."""
    turns = [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(_list(row, "conversations"))]
    if system := _optional(row, "system"):
        turns.insert(0, {"role": "system", "content": system})
    return check_conversation(turns, field="conversations", tools=row.get("tools"))


def _sharegpt_turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("message is no object", f"is {json_type(turn)}, not an object with from and value", field=place)
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        problem = "is missing" if speaker is None else f"{quote(speaker)} is no role: known are human, gpt, system, ..."
        raise BadRow("unknown role", problem, field=f"{place}.from")
    if not isinstance(value, str):
        raise BadRow("content is no text", f"is {json_type(value)}, not a string", field=f"{place}.value")
    if speaker not in {"function_call", "tool_call"}:
        return {"role": SHAREGPT_ROLES[speaker], "content": value}
    calls = parse_json_field(value, field=f"{place}.value")
    return {"role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def parse_alpaca(row: RawRow) -> Conversation:
    """An instruction with optional input, system text and earlier turns."""
    # One line break between instruction and input, as LLaMA-Factory joins them.
    given = [_text(row, "instruction"), _optional(row, "input")]
    turns: list[Message] = []
    if system := _optional(row, "system"):
        turns.append({"role": "system", "content": system})
    for index, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("wrong history", "is no pair of question and answer", field=f"history[{index}]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    output = _text(row, "output")
    if not output.strip():
        raise BadRow("nothing to learn", "is empty: there is no answer to learn from", field="output")
    turns.append({"role": "user", "content": "\n".join(part for part in given if part)})
    turns.append({"role": "assistant", "content": output})
    return check_conversation(turns, field="history")


def parse_prompt_completion(row: RawRow) -> PromptCompletion | Conversation:
    """Two literal texts, or two lists of messages that make one conversation."""
    prompt, completion = _present(row, "prompt"), _present(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(turn, dict) and turn.get("role") != "assistant" for turn in completion[:1]):
            raise BadRow("wrong role order", "starts with another role than assistant", field="completion")
        return check_conversation([*prompt, *completion], field="prompt + completion", tools=row.get("tools"))
    literal = PromptCompletion(_text(row, "prompt"), _text(row, "completion"))
    if not literal.completion.strip():
        raise BadRow("nothing to learn", "is empty: there is nothing to learn from", field="completion")
    return literal


def parse_text(row: RawRow) -> Document:
    """A document."""
    found = _text(row, "text")
    if not found.strip():
        raise BadRow("nothing to learn", "is empty", field="text")
    return Document(found)


def parse_tokens(row: RawRow) -> TokenIds:
    """Ready ids; labels, where there are any, decide alone what carries loss."""
    ids = _whole_numbers(row, "input_ids")
    labels = _whole_numbers(row, "labels") if row.get("labels") is not None else None
    if labels is not None:
        if len(labels) != len(ids):
            problem = f"has {len(labels)} entries where input_ids has {len(ids)}"
            raise BadRow("labels do not fit", problem, field="labels")
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in {-100, token}:
                problem = f"is {label}: a label is -100 or the id at its place, here {token} (not shifted)"
                raise BadRow("labels do not fit", problem, field=f"labels[{index}]")
    if row.get("attention_mask") is not None:
        mask = _whole_numbers(row, "attention_mask")
        if mask != [1] * len(ids):
            raise BadRow("masked tokens", "is not all ones: leave padding out", field="attention_mask")
    if len(ids) < 2:
        raise BadRow("nothing to learn", "is shorter than 2 ids: nothing follows the first", field="input_ids")
    return TokenIds(ids, labels)


def parse_classification(row: RawRow) -> ClassificationExample:
    """A text with a label: a name or number, a list of them, or a number to come near to."""
    first, label = _text(row, "text"), _present(row, "label")
    if not first.strip():
        raise BadRow("nothing to read", "is empty", field="text")
    if isinstance(label, list):
        for index, each in enumerate(label):
            _label(each, f"label[{index}]")
    else:
        _label(label, "label")
    return ClassificationExample(first, _text(row, "text_pair") if row.get("text_pair") is not None else None, label)


def parse_tagging(row: RawRow) -> TaggingExample:
    """Words and one tag for each."""
    words, tags = _list(row, "tokens"), _list(row, "tags")
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            problem = "is empty" if isinstance(word, str) else f"is {json_type(word)}, not a string"
            raise BadRow("not a word", problem, field=f"tokens[{index}]")
    if len(words) != len(tags):
        raise BadRow("tags do not fit", f"has {len(tags)} entries where tokens has {len(words)}", field="tags")
    if not words:
        raise BadRow("nothing to learn", "is empty", field="tokens")
    for index, tag in enumerate(tags):
        _label(tag, f"tags[{index}]")
    return TaggingExample(words, tags)


def _label(value: object, field: str) -> None:
    if not isinstance(value, str | int | float):  # a bool is an int
        raise BadRow("not a label", f"is {json_type(value)}, not a name or number", field=field)
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        raise BadRow("no label", f"is {value}, which stands for a row without label", field=field)
    if value == "":
        raise BadRow("no label", "is empty", field=field)


# In the order in which `auto` tries them: the more columns a format needs, the surer the match.
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
    "text": Format(("text",), (), parse_text, "a document: every token is learnt, EOS at its end"),
    "classification": Format(
        ("text", "label"),
        ("text_pair",),
        parse_classification,
        "text, optional text_pair, and a label, number or list of labels",
    ),
    "tagging": Format(("tokens", "tags"), (), parse_tagging, "a list of words, and a list with the tag of each"),
}


# How `data.columns` is meant, for messages.
COLUMN_EXAMPLES: dict[TaskName, str] = {
    "causal-lm": "{prompt: question, completion: answer}",
    "seq-cls": "{text: sentence, label: class}",
    "token-cls": "{tokens: words, tags: ner_tags}",
    "seq2seq-lm": "{prompt: document, completion: summary}",
}


def rename_columns(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`row` with the format's names for its columns, as `data.columns` says."""
    if not columns:
        return row
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{name: row[column] for name, column in columns.items() if column in row}}


def parse_row(row: RawRow, name: FormatName) -> Example:
    """`row` read as the named format.

    Raises:
        BadRow: it is not one.
    """
    wanted = FORMATS[name]
    for column in wanted.required:
        if column not in row:
            raise BadRow("missing field", f"is missing; the row has {column_names(row)}", field=column)
    return wanted.read(row)


class DetectedFormat(NamedTuple):
    """What `auto` made of a source."""

    name: FormatName
    why: str
    columns: dict[str, str]  # renames that the format needs here, as in data.columns


def detect_format(places: Sequence[str], rows: Sequence[RawRow], task: TaskName = "causal-lm") -> DetectedFormat:
    """The one format of the task that all the given first rows have; `places` names them in messages.

    Raises:
        LoraError: none fits, or the rows disagree; names the rows.
    """
    looks = [(place, row, _detect_one(place, row, task)) for place, row in zip(places, rows, strict=True)]
    # Rows that look like nothing are bad rows, and reported as such; rows that look like something else are a mixture.
    known = [(place, row, name) for place, row, name in looks if name is not None]
    if not known:
        raise LoraError(
            f"{places[0]}: no known format has these columns: {column_names(rows[0])}",
            hint=f"map them, as in data.columns: {COLUMN_EXAMPLES[task]}",
        )
    at, row, first = known[0]
    for place, _, name in known:
        if name != first:
            raise LoraError(
                f"data: rows of several formats: {at} looks like {first}, {place} like {name}",
                hint="set data.format, or list the rows of each format as a source of its own",
            )
    if first == "messages" and "messages" not in row:
        return DetectedFormat("messages", "role and content in column conversations", {"messages": "conversations"})
    seen = [column for column in (*FORMATS[first].required, *FORMATS[first].optional) if column in row]
    return DetectedFormat(first, f"its rows have {' + '.join(seen)}", {})


def _detect_one(place: str, row: RawRow, task: TaskName) -> FormatName | None:
    if task == "causal-lm" and "chosen" in row and "rejected" in row:
        raise LoraError(
            f"{place}: a preference row (chosen and rejected answers), which `task: causal-lm` cannot learn from",
            hint="to learn the chosen answers: format: prompt-completion, columns: {completion: chosen}",
        )
    turns = row.get("conversations") if task == "causal-lm" else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return "messages"
    fitting = (name for name in FORMATS if name in TASK_FORMATS[task])
    return next((name for name in fitting if all(c in row for c in FORMATS[name].required)), None)


def column_names(row: RawRow) -> str:
    """The columns of a row, for a message."""
    names = [quote(name) if not name.isidentifier() else name for name in row]
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "no fields"


def _present(row: RawRow, field: str) -> Any:
    value = row[field]
    if value is None:
        raise BadRow("null field", "is null", field=field)
    return value


def _text(row: RawRow, field: str) -> str:
    value = _present(row, field)
    if not isinstance(value, str):
        raise BadRow("not a string", f"is {json_type(value)}, not a string", field=field)
    return value


def _optional(row: RawRow, field: str) -> str:
    return "" if row.get(field) is None else _text(row, field)


def _list(row: RawRow, field: str) -> list[Any]:
    value = _present(row, field)
    if isinstance(value, str):
        # Tables (.csv, many .parquet files) hold lists as JSON text.
        value = parse_json_field(value, field=field)
    if not isinstance(value, list):
        raise BadRow("not a list", f"is {json_type(value)}, not a list", field=field)
    return value


def _whole_numbers(row: RawRow, field: str) -> list[int]:
    values = _list(row, field)
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRow("not a token id", f"is {json_type(value)}, not a whole number", field=f"{field}[{index}]")
    return values
