"""Validate the messages of a conversation: roles, content, tool calls, loss flags. Pure: no tokenizer, no torch."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.loss_flags import TurnLoss, take_flags, turn_loss
from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.reasoning import with_one_reasoning
from lora_cli.data.records import BadRow
from lora_cli.data.tool_schemas import tool_schemas
from lora_cli.recipe.message_names import ROLES

Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages and tool schemas in the form that chat templates expect."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None  # JSON schemas
    loss: tuple[TurnLoss | None, ...] = ()  # which parts of each message carry loss; empty: no flag takes loss away
    field: str = "messages"  # its column, for messages
    joined: int = 0  # turns that were joined with the turn before
    cut: bool = False  # turns behind its last answer were cut
    variables: Mapping[str, Any] = {}  # template variables: {"enable_thinking": False}
    added: int = 0  # messages before those of its column: 1 for a system message from a column of its own

    def location(self, index: int) -> str:
        """Return the place of a message in the row, `messages[1]`, before turns are joined."""
        return f"{self.field}[{index - self.added}]" if index >= self.added else "system"


def check_conversation(messages: Sequence[Any], *, field: str, tools: object = None, system: str = "") -> Conversation:
    """Validate each of `messages`, and remove its null fields, as transformers does, and its loss flags.

    The order of the turns is not checked: `turns.arrange_turns` does that. `system` is a system message before them,
    empty for none.

    Raises:
        BadRow: a message is invalid.
    """
    if not messages:
        raise BadRow("empty conversation", "contains no messages", field=field)
    checked: list[Message] = []
    losses: list[TurnLoss | None] = []
    for index, value in enumerate(messages):
        location = f"{field}[{index}]"
        if not isinstance(value, dict):
            problem = f"is {json_type(value)}, not an object with role and content"
            raise BadRow("message is not an object", problem, field=location)
        message = dict(value)
        flags = take_flags(message, location)
        checked.append(_check_message(message, location))
        losses.append(turn_loss(flags, checked[-1], location))
    flagged = any(loss is not None for loss in losses)
    if system:
        checked.insert(0, {"role": "system", "content": system})
        losses.insert(0, None)
    return Conversation(checked, tool_schemas(tools), tuple(losses) if flagged else (), field, added=int(bool(system)))


def _check_message(raw: dict[str, Any], location: str) -> Message:
    message = {key: value for key, value in raw.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise BadRow("message without role", "has no role", field=location)
    if role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        problem = f"{quote(role)} is not a role: " + (
            f"did you mean {close[0]}?" if close else f"known roles are {', '.join(ROLES)}"
        )
        raise BadRow("unknown role", problem, field=f"{location}.role")
    if "tool_calls" in message and not (calls := _listed_calls(message["tool_calls"], f"{location}.tool_calls")):
        del message["tool_calls"]
    if "tool_calls" in message:
        if role != "assistant":
            raise BadRow(
                "wrong tool call", f"only the assistant can call tools, not the {role}", field=f"{location}.tool_calls"
            )
        message["tool_calls"] = [
            _check_tool_call(call, f"{location}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    if "content" not in message:
        if "tool_calls" not in message:
            raise BadRow("no content", "is null" if "content" in raw else "is missing", field=f"{location}.content")
        # Most templates read the field without checking that it exists; all of them render "" as nothing.
        message["content"] = ""
    else:
        message["content"] = _join_text_parts(message["content"], f"{location}.content")
    if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise BadRow("nothing to learn", "is empty: there is no answer to learn from", field=f"{location}.content")
    return with_one_reasoning(message, location) if role == "assistant" else message


def _join_text_parts(content: object, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("content is not text", f"is {json_type(content)}, not a string", field=field)
    texts = []
    for index, part in enumerate(content):
        part_kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if part_kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                "content is not text", f"is {quote(part_kind)}: only text is supported", field=f"{field}[{index}]"
            )
        texts.append(part["text"])
    return "".join(texts)


def _listed_calls(calls: object, field: str) -> list[Any]:
    """Return the calls of a message as a list; empty if it calls no tool."""
    if isinstance(calls, str):  # tables store lists as JSON text
        calls = parse_json_field(calls, field=field) if calls.strip() else None
    if calls is None:
        return []
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise BadRow("wrong tool call", f"is {json_type(calls)}, not a list", field=field)
    return calls


ARGUMENTS = ("arguments", "parameters", "input", "args")  # names of a call's arguments, the first that it has


def _check_tool_call(call: object, field: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow("wrong tool call", f"is {json_type(call)}, not an object", field=field)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow("wrong tool call", "has no function name", field=field)
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        # OpenAI's files store them as JSON text; templates expect the object, and would quote the text again.
        arguments = parse_json_field(arguments, field=f"{field}.function.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadRow(
            "wrong tool call", f"is {json_type(arguments)}, not an object", field=f"{field}.function.arguments"
        )
    extra = {key: value for key, value in call.items() if key in {"id", "type"} and value is not None}
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}}
