"""Check a conversation: roles, their order, contents and tool calls. Pure: no tokenizer, no torch."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_cli.data.readers import json_type, parse_json_field, quote
from lora_cli.data.records import BadRow

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Who may speak after whom; None is the start. A system message stands first or not at all.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user", "assistant"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


class Conversation(NamedTuple):
    """Messages as chat templates take them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None


def check_conversation(messages: Sequence[Any], *, field: str, tools: object = None) -> Conversation:
    """`messages` checked, with null fields left out, as transformers does before it renders.

    Raises:
        BadRow: one of them cannot be trained on.
    """
    if not messages:
        raise BadRow("empty conversation", "holds no messages", field=field)
    checked: list[Message] = []
    before: str | None = None
    for index, given in enumerate(messages):
        place = f"{field}[{index}]"
        message = _message(given, place)
        role = message["role"]
        if role not in FOLLOWS[before]:
            problem = f"{role} cannot follow {before}"
            if before is None:
                problem = f"a conversation cannot start with {role}"
            elif role in {"system", "developer"}:
                problem = f"{role} can only stand first"
            raise BadRow("wrong role order", problem, field=f"{place}.role")
        if role == "tool" and before == "assistant" and "tool_calls" not in checked[-1]:
            problem = "tool can only follow an assistant message with tool_calls"
            raise BadRow("wrong role order", problem, field=f"{place}.role")
        checked.append(message)
        before = role
    if before != "assistant":
        problem = f"ends with {before}: there is no answer to learn from"
        raise BadRow("no answer at the end", problem, field=field)
    return Conversation(checked, tool_schemas(tools))


def _message(given: object, place: str) -> Message:
    if not isinstance(given, dict):
        raise BadRow("message is no object", f"is {json_type(given)}, not an object with role and content", field=place)
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise BadRow("message without role", "has no role", field=place)
    if role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        problem = f"{quote(role)} is no role: " + (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(ROLES)}"
        )
        raise BadRow("unknown role", problem, field=f"{place}.role")
    if message.get("weight", 1) != 1:
        problem = "weights of single messages are not supported: data.loss_on says which turns carry loss"
        raise BadRow("message weight", problem, field=f"{place}.weight")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        if role != "assistant":
            raise BadRow(
                "wrong tool call", f"only the assistant calls tools, not the {role}", field=f"{place}.tool_calls"
            )
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    if "content" not in message:
        if "tool_calls" not in message:
            raise BadRow("no content", "is null" if "content" in given else "is missing", field=f"{place}.content")
        # Most templates read the field without asking; "" renders as nothing in all of them.
        message["content"] = ""
    else:
        message["content"] = _content(message["content"], f"{place}.content")
    if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise BadRow("nothing to learn", "is empty: there is no answer to learn from", field=f"{place}.content")
    return message


def _content(content: object, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("content is no text", f"is {json_type(content)}, not a string", field=field)
    texts = []
    for index, part in enumerate(content):
        part_kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if part_kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                "content is no text", f"is {quote(part_kind)}: only text is supported", field=f"{field}[{index}]"
            )
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: object, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRow("wrong tool call", f"is {json_type(calls)}, not a list", field=field)
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, field: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow("wrong tool call", f"is {json_type(call)}, not an object", field=field)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool call", "has no function name", field=field)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI's files hold them as JSON text; templates expect the object and would quote the text again.
        arguments = parse_json_field(arguments, field=f"{field}.function.arguments")
    if not isinstance(arguments, dict):
        raise BadRow(
            "wrong tool call", f"is {json_type(arguments)}, not an object", field=f"{field}.function.arguments"
        )
    extra = {key: value for key, value in call.items() if key in {"id", "type"} and value is not None}
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}}


def tool_schemas(tools: object) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of JSON schemas, or such a list as JSON text; nothing is None.

    Raises:
        BadRow: it is something else.
    """
    if isinstance(tools, str) and tools.strip():
        tools = parse_json_field(tools, field="tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow("wrong tools", f"is {json_type(tools)}, not a list of tool schemas", field="tools")
    for index, tool in enumerate(tools):
        schema = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            raise BadRow("wrong tools", "is no tool schema: it has no name", field=f"tools[{index}]")
    return tools
