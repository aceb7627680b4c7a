"""Bring the messages of other tools (sharegpt, ms-swift, Anthropic, Gemini, OpenAI functions) into one form.

The form is that of chat templates: `role`, `content`, `tool_calls`. Names of keys and roles can be set with
`data.message_fields` and `data.roles`. What the messages must contain is checked in conversation.py.
No tokenizer, no torch.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.conversation import ARGUMENTS, Message
from lora_cli.data.loss_flags import LOSS_FLAGS, RANGE_FLAGS, flags_of
from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.records import BadRow
from lora_cli.recipe.message_names import ROLES

# Names of the role and of the content, the first that a message has. data.message_fields sets others.
FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "role": ("role", "from", "speaker", "author", "sender"),
    "content": ("content", "value", "text", "message", "utterance", "parts"),
}

TOOL_CALL = "tool_call"  # a turn of its own that contains the JSON of a tool call

# Names of roles in lower case. data.roles sets others.
ROLE_NAMES: dict[str, str] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot", "llm"), "assistant"),
    **dict.fromkeys(("function_call", TOOL_CALL), TOOL_CALL),
    **dict.fromkeys(
        ("observation", "function", "function_response", "tool_response", "tool_result", "function_result", "ipython"),
        "tool",
    ),
}

# Keys of a message that this package reads. A chat template may read others, such as `name`.
READ_KEYS = {
    *("role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"),
    *LOSS_FLAGS,
    *RANGE_FLAGS,
}
# Keys of a text part of a message that this package reads.
READ_PART_KEYS = {"type", "text", *LOSS_FLAGS}
# Keys of a tool call that this package reads.
READ_CALL_KEYS = {"id", "type", "function", "name", *ARGUMENTS}
TEXT_PARTS = ("text", "input_text", "output_text")  # the last two: OpenAI's Responses API


class MessageNames(NamedTuple):
    """The names that a recipe sets for the keys of messages and for roles."""

    fields: Mapping[str, str] = {}  # key of this package: key in the file
    roles: Mapping[str, str] = {}  # role in the file: role of this package


class Origin(NamedTuple):
    """Where a message comes from, for error messages."""

    position: int  # in the file's list
    names: dict[str, str]  # key of this package: key in the file


class NormalizedMessages(NamedTuple):
    """The messages of one list, in the form of chat templates."""

    messages: list[Any]
    origins: list[Origin]  # of each message
    unread: Counter[str]  # messages by key of a content part that nothing reads

    def field_in_file(self, field: str, column: str) -> str:
        """Return a field of these messages, `messages[1].content`, with the index and key that the file has."""
        match = re.fullmatch(rf"{re.escape(column)}\[(\d+)\](?:\.(\w+))?(.*)", field)
        if match is None or int(match[1]) >= len(self.origins):
            return field
        position, names = self.origins[int(match[1])]
        key = f".{names.get(match[2], match[2])}" if match[2] else ""
        return f"{column}[{position}]{key}{match[3]}"


def normalize_messages(values: Sequence[Any], *, field: str, names: MessageNames) -> NormalizedMessages:
    """Return `values` with the keys, roles, tool calls and tool results of chat templates.

    Values that are not messages are returned unchanged.

    Raises:
        BadRow: a role is unknown, or a tool call cannot be read.
    """
    result = NormalizedMessages([], [], Counter())
    for index, value in enumerate(values):
        # Most messages have this form already, and the rest of this loop takes longer than to parse and validate them.
        if not isinstance(value, dict) or (not any(names) and _is_standard(value)):
            result.messages.append(value)
            result.origins.append(Origin(index, {}))
            continue
        location = f"{field}[{index}]"
        message, keys = _with_standard_keys(value, names.fields)
        # With {content: value}, a `content` of the file is not read.
        result.unread.update(
            f"{name} beside {key}"
            for name, key in {**keys, **names.fields}.items()
            if value.get(name) is not None and name not in (*keys.values(), *names.fields.values())
        )
        if message.get("role") is not None:
            message["role"] = _role(message["role"], names.roles, f"{location}.{keys.get('role', 'role')}")
        _count_call_keys(message.get("tool_calls"), result.unread)
        content_field = f"{location}.{keys.get('content', 'content')}"
        _read_function_call(message, location)
        if message.get("role") == TOOL_CALL:
            calls = _calls_of_text(message.get("content"), content_field)
            message = {**message, "role": "assistant", "content": None, "tool_calls": calls}
            if _extend_answer(result.messages, message):
                continue
        for part in _split_blocks(message, content_field, result.unread):
            result.messages.append(part)
            result.origins.append(Origin(index, keys))
    return result


def _is_standard(message: Message) -> bool:
    role = message.get("role")
    return (
        isinstance(role, str)
        and role in ROLES
        and isinstance(message.get("content"), str)
        and "tool_calls" not in message
        and "function_call" not in message
    )


def _with_standard_keys(value: Message, fields: Mapping[str, str]) -> tuple[Message, dict[str, str]]:
    """Return the message with this package's keys, and the file's key for each that has another name."""
    keys: dict[str, str] = {}
    for name in {**FIELD_NAMES, **fields}:
        candidates = (fields[name],) if name in fields else FIELD_NAMES[name]
        filled = [key for key in candidates if value.get(key) is not None]
        found = next(iter(filled or [key for key in candidates if key in value]), None)
        if found is not None:
            keys[name] = found
    renamed = {file_key: name for name, file_key in keys.items()}
    message = {
        renamed.get(key, key): item
        for key, item in value.items()
        if key in renamed or (key not in keys and key not in fields)
    }
    return message, {name: key for name, key in {**keys, **fields}.items() if name != key}


def _role(value: object, roles: Mapping[str, str], field: str) -> str:
    if isinstance(value, str) and value in roles:
        return roles[value]
    if isinstance(value, str) and value.lower() in ROLE_NAMES:
        return ROLE_NAMES[value.lower()]
    close = difflib.get_close_matches(str(value).lower(), (*ROLES, *ROLE_NAMES), n=1)
    problem = f"{quote(value)} is not a role: " + (
        f"did you mean {close[0]}?" if close else f"known roles are {', '.join(ROLES)}"
    )
    hint = None
    if isinstance(value, str) and not close:
        hint = f"write which role it is: data.roles: {{{value}: user}}; or set data.on_bad_row: skip"
    raise BadRow("unknown role", problem, field=field, hint=hint)


def _read_function_call(message: Message, location: str) -> None:
    """Replace OpenAI's older `function_call` by `tool_calls`."""
    call = message.pop("function_call", None)
    if call is None:
        return
    field = f"{location}.function_call"
    if message.get("tool_calls"):
        raise BadRow("wrong tool call", "the message has function_call and tool_calls", field=field)
    if isinstance(call, str):
        call = parse_json_field(call, field=field)
    if not isinstance(call, dict):
        raise BadRow("wrong tool call", f"is {json_type(call)}, not an object", field=field)
    message["tool_calls"] = [{"type": "function", "function": call}]


def _calls_of_text(content: object, field: str) -> list[Any]:
    calls = parse_json_field(content, field=field) if isinstance(content, str) else content
    if isinstance(calls, dict):
        return [calls]
    if not isinstance(calls, list):
        raise BadRow("wrong tool call", f"is {json_type(calls)}, not the JSON of a tool call", field=field)
    return calls


def _count_call_keys(calls: object, unread: Counter[str]) -> None:
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, dict):
            unread.update(f"tool_calls[].{key}" for key in _filled(call).keys() - READ_CALL_KEYS)


def _extend_answer(messages: list[Any], call: Message) -> bool:
    """Add the calls to the answer before them, of which they are a part; False if there is none.

    A turn with keys of its own, such as a loss flag, stays a turn of its own.
    """
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return False
    before = last.get("tool_calls") or []
    answer_keys = {"role", "content", "tool_calls", "reasoning_content", "reasoning", "thinking"}
    if not isinstance(before, list) or {*_filled(call), *_filled(last)} - answer_keys:
        return False
    messages[-1] = {**last, "tool_calls": [*before, *call["tool_calls"]]}
    return True


def _split_blocks(message: Message, field: str, unread: Counter[str]) -> list[Message]:
    """Return the messages that a message with content blocks stands for.

    In a list of content blocks, tool calls, tool results and reasoning become tool calls, messages of the role tool,
    and `reasoning_content`, as chat templates expect them.
    """
    blocks = message.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return [message]
    messages: list[Message] = []
    current: Message | None = None
    others = {key: value for key, value in message.items() if key not in {"role", "content", "tool_calls"}}
    is_answer = message.get("role") == "assistant"
    thoughts = ""
    for index, block in enumerate(blocks):
        kind, value = _block(block)
        if kind in {"tool_result", "functionResponse"}:
            messages.append({**others, **_tool_result(kind, value, unread)})
            current = None
            continue
        if current is None:
            current, thoughts = {**message, "content": []}, ""
            messages.append(current)
        if kind in {"tool_use", "functionCall", "thinking"} and (flags := flags_of(value)):
            problem = f"belongs to a {kind} block, but only a turn or a part of its text can have a loss flag"
            raise BadRow("loss flag of a block", problem, field=f"{field}[{index}].{next(iter(flags))}")
        if kind in {"tool_use", "functionCall"} and is_answer:
            before = current.get("tool_calls") or []
            if not isinstance(before, list):
                problem = f"is {json_type(before)}, not a list, and the content has tool calls too"
                raise BadRow("wrong tool call", problem, field=f"{field.rpartition('.')[0]}.tool_calls")
            current["tool_calls"] = [*before, _call_of_block(value)]
        elif kind == "thinking" and is_answer and isinstance(value.get("thinking"), str):
            if not thoughts and current.get("reasoning_content"):
                problem = "is reasoning, and the message has reasoning_content too: keep one"
                raise BadRow("two reasonings", problem, field=f"{field}[{index}]")
            thoughts += value["thinking"]
            current["reasoning_content"] = thoughts
        else:
            if current.get("tool_calls") and kind == "text":
                problem = "is text after a tool call, which chat templates cannot write"
                raise BadRow("text after a tool call", problem, field=f"{field}[{index}]")
            if kind == "text":
                unread.update(f"content[].{key}" for key in _filled(value).keys() - READ_PART_KEYS)
            current["content"].append(value)
    for each in messages:
        if each["content"] == [] and each.get("tool_calls"):
            each["content"] = None  # a call without text
    return messages or [message]


def _block(block: Message) -> tuple[str, Message]:
    """Return the kind of a content block, and the block with a kind that this package knows."""
    kind = block.get("type")
    if kind in TEXT_PARTS:
        return "text", {**block, "type": "text"}
    if kind is None:
        for name, spellings in (
            ("functionCall", ("functionCall", "function_call")),
            ("functionResponse", ("functionResponse", "function_response")),
        ):
            for key in spellings:
                if isinstance(block.get(key), dict):
                    return name, block[key]
        if isinstance(block.get("text"), str):
            return "text", {"type": "text", **block}
    return str(kind), block


def _call_of_block(block: Message) -> Message:
    arguments = block.get("input") if block.get("input") is not None else block.get("args")
    function = {"name": block.get("name"), "arguments": {} if arguments is None else arguments}
    return {**({"id": block["id"]} if block.get("id") is not None else {}), "type": "function", "function": function}


def _tool_result(kind: str, block: Message, unread: Counter[str]) -> Message:
    if kind == "functionResponse":
        name = {"name": block["name"]} if block.get("name") is not None else {}
        return {"role": "tool", **name, "content": json.dumps(block.get("response"), ensure_ascii=False)}
    read = {"type", "tool_use_id", "content"}
    unread.update(f"content[].{key}" for key in _filled(block).keys() - read)
    call = {"tool_call_id": block["tool_use_id"]} if block.get("tool_use_id") is not None else {}
    return {"role": "tool", **call, "content": "" if block.get("content") is None else block["content"]}


def _filled(values: Message) -> Message:
    return {key: value for key, value in values.items() if value is not None}


def unread_keys(messages: Sequence[Message]) -> Counter[str]:
    """Return the number of messages by key that this package does not read; a chat template may read it."""
    # The name of a tool is in the call that its result answers.
    return Counter(
        key
        for message in messages
        for key in message.keys() - READ_KEYS
        if not (key == "name" and message["role"] == "tool")
    )
