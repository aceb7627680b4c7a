"""Suggest data.columns for rows whose columns no format has: {question, answer} and other names. Pure: no tokenizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_cli.data.readers import parse_json_field
from lora_cli.data.records import BadRow
from lora_cli.recipe.tasks import FormatName, TaskName

# Column names that datasets use, the most likely first; compared in lower case.
QUESTIONS = (
    *("instruction", "question", "query", "prompt", "problem", "user", "human", "input", "request", "inputs", "source"),
    *("user_prompt", "user_message", "user_input", "instruct", "question_text", "title"),
)
ANSWERS = (
    *("output", "answer", "response", "completion", "solution", "assistant", "target", "reply", "targets", "outputs"),
    *("bot", "gpt", "chatgpt", "final_answer", "generated_solution", "output_text", "answer_text", "best_answer"),
    *("assistant_message", "assistant_response", "model_response", "chosen", "label"),
)
INPUTS = ("input", "context", "passage")
SYSTEMS = ("system", "system_prompt", "system_message", "sys")
MESSAGES = (
    *("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "chat", "turns", "contents"),
    *("message", "msgs", "chat_history", "trajectory"),
)
TEXTS = ("text", "content", "document", "body", "article", "raw_text", "code", "raw_content", "markdown", "passage")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "score")
CLASSIFIED = ("text", "sentence", "review", "content", "premise", "utterance", "body", "title")
SOURCES = (*QUESTIONS, "document", "article", "dialogue", "text")
TARGETS = (*ANSWERS, "summary", "highlights", "translation", "abstract", "headline")

# Examples of `data.columns`, for messages.
COLUMN_EXAMPLES: dict[TaskName, str] = {
    "causal-lm": "format: alpaca, columns: {instruction: question, output: answer}",
    "seq-cls": "{text: sentence, label: class}",
    "token-cls": "{tokens: words, tags: ner_tags}",
    "seq2seq-lm": "{prompt: document, completion: summary}",
}


class _Mapping(NamedTuple):
    """Columns of a format, and the column of the file for each."""

    format: FormatName
    columns: dict[str, str]

    def __str__(self) -> str:
        renamed = ", ".join(f"{name}: {column}" for name, column in self.columns.items() if name != column)
        return f"format: {self.format}" + (f", columns: {{{renamed}}}" if renamed else "")


def mapping_hint(row: Mapping[str, Any], task: TaskName, *, has_template: bool | None) -> str:
    """Return how to map the columns of a row.

    Args:
        row: of a source that no format fits.
        task: of the recipe.
        has_template: whether the model's tokenizer has a chat template; None if it is not known.
    """
    found = _find_mapping(row, task, literal=has_template is False)
    if found is None:
        return f"map them with data.columns, for example {COLUMN_EXAMPLES[task]}"
    if found.format != "alpaca":
        reason = ": there is no chat template, so the texts are joined as they are"
        return f"write {found}" + (reason if task == "causal-lm" and found.format == "prompt-completion" else "")
    return f"write {found}, which keeps the model's chat template"


def missing_column_hint(row: Mapping[str, Any], name: FormatName) -> str | None:
    """Return how to map the columns of a row to those of a format that was set; None if they are not recognized."""
    found: _Mapping | None = None
    match name:
        case "alpaca":
            found = _pair(row, name, instruction=QUESTIONS, output=ANSWERS)
        case "query-response":
            found = _pair(row, name, query=QUESTIONS, response=ANSWERS)
        case "prompt-completion":
            found = _pair(row, name, prompt=SOURCES, completion=TARGETS)
        case "classification":
            found = _pair(row, name, text=CLASSIFIED, label=LABELS)
        case "messages" | "sharegpt":
            column = _column(row, MESSAGES, _is_message_list)
            found = _Mapping(name, {"messages" if name == "messages" else "conversations": column}) if column else None
        case "text":
            column = _column(row, TEXTS, _is_text)
            found = _Mapping(name, {"text": column}) if column else None
    return f"map them with data.{str(found).partition(', ')[2]}" if found else None


def _find_mapping(row: Mapping[str, Any], task: TaskName, *, literal: bool) -> _Mapping | None:
    if task == "seq-cls":
        return _pair(row, "classification", text=CLASSIFIED, label=LABELS)
    if task == "seq2seq-lm":
        return _pair(row, "prompt-completion", prompt=SOURCES, completion=TARGETS)
    if task == "token-cls":
        return None
    if messages := _column(row, MESSAGES, _is_message_list):
        return _Mapping("messages", {"messages": messages})
    if literal:
        pair = _pair(row, "prompt-completion", prompt=QUESTIONS, completion=ANSWERS)
    elif pair := _pair(row, "alpaca", instruction=QUESTIONS, output=ANSWERS):
        used = set(pair.columns.values())
        for name, columns in (("input", INPUTS), ("system", SYSTEMS)):
            if (column := _column(row, columns, _is_text)) and column not in used:
                pair.columns[name] = column
    if pair is None and (text := _column(row, TEXTS, _is_text)):
        return _Mapping("text", {"text": text})
    return pair


def _pair(row: Mapping[str, Any], format_: FormatName, **columns: tuple[str, ...]) -> _Mapping | None:
    """Return the mapping of the format's columns, each to the first column of the row with one of its names."""
    found: dict[str, str] = {}
    for name, candidates in columns.items():
        is_value = _is_label if name == "label" else _is_text
        column = _column({key: row[key] for key in row if key not in found.values()}, candidates, is_value)
        if column is None:
            return None
        found[name] = column
    return _Mapping(format_, found)


def _column(row: Mapping[str, Any], names: tuple[str, ...], accepts: Any) -> str | None:
    """Return the column with the first of `names` whose value is accepted."""
    by_name = {column.lower(): column for column in row if accepts(row[column])}
    return next((by_name[name] for name in names if name in by_name), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_label(value: object) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _is_message_list(value: object) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json_field(value, field="")
        except BadRow:
            return False
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
