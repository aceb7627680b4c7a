"""Read tool schemas (OpenAI, Anthropic, Gemini, MCP, xLAM, ToolBench, ...) into the form that chat templates expect.

That form is OpenAI's: `{"type": "function", "function": {"name", "description", "parameters"}}`. No torch.
"""

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.readers import json_type, parse_json_field
from lora_cli.data.records import BadRow

ToolSchema = dict[str, Any]

DECLARATIONS = ("function_declarations", "functionDeclarations")  # Gemini: a list of functions in one tool
# Keys that other tools use for a function's name, description and parameters.
NAMES = ("name", "api_name")
DESCRIPTIONS = ("description", "api_description")
PARAMETERS = ("parameters", "input_schema", "inputSchema", "parameter_definitions")
PARAMETER_LISTS = ("required_parameters", "optional_parameters")  # ToolBench


def tool_schemas(tools: object, *, field: str = "tools") -> list[ToolSchema] | None:
    """Return the schemas of a `tools` column, which is a list or its JSON text; None if it is empty.

    A schema that has the form of chat templates is returned unchanged.

    Raises:
        BadRow: the column is not a list of schemas with names.
    """
    if isinstance(tools, str):
        tools = parse_json_field(tools, field=field) if tools.strip() else None
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRow("wrong tools", f"is {json_type(tools)}, not a list of tool schemas", field=field)
    return [schema for index, tool in enumerate(tools) for schema in _schemas_of(tool, f"{field}[{index}]")]


def _schemas_of(tool: object, field: str) -> list[ToolSchema]:
    if isinstance(tool, str):  # tables store each schema as JSON text
        tool = parse_json_field(tool, field=field)
    if isinstance(tool, dict):
        for key in DECLARATIONS:
            if isinstance(tool.get(key), list):
                return [
                    schema for i, each in enumerate(tool[key]) for schema in _schemas_of(each, f"{field}.{key}[{i}]")
                ]
        function = tool.get("function")
        if isinstance(function, dict) and _first(function, NAMES):
            texts = isinstance(function.get("name"), str) and not isinstance(function.get("parameters"), str)
            if tool.get("type") == "function" and texts:
                return [tool]
            return [{"type": "function", "function": _function(function, field)}]
        if _first(tool, NAMES):
            flat = {key: value for key, value in tool.items() if key != "type"}
            return [{"type": "function", "function": _function(flat, field)}]
    raise BadRow("wrong tools", "is not a tool schema: it has no name", field=field)


def _first(values: dict[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first of `keys` that has a value."""
    return next((key for key in keys if values.get(key) not in (None, "")), None)


def _function(values: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a function with name, description and a JSON schema of its parameters, and its other keys unchanged."""
    name, description, parameters = (_first(values, keys) for keys in (NAMES, DESCRIPTIONS, PARAMETERS))
    if not name or not isinstance(values[name], str):
        raise BadRow("wrong tools", "is not a tool schema: its name is not a string", field=field)
    listed = [each for key in PARAMETER_LISTS if isinstance(values.get(key), list) for each in values[key]]
    used = {name, description, parameters, *PARAMETER_LISTS}
    schema: object = values[parameters] if parameters else listed
    if isinstance(schema, str):
        schema = parse_json_field(schema, field=f"{field}.{parameters}")
    if isinstance(schema, list):
        schema = _properties_of_list(schema, required=_required(values), field=field)
    return {
        "name": values[name],
        **({"description": values[description]} if description else {}),
        "parameters": _object_schema(schema, field),
        **{key: value for key, value in values.items() if key not in used and value is not None},
    }


def _required(values: dict[str, Any]) -> list[Any]:
    required = values.get("required_parameters")
    return required if isinstance(required, list) else []


def _properties_of_list(parameters: list[Any], *, required: list[Any], field: str) -> dict[str, Any]:
    """Return the JSON schema of a list of parameters with a name each."""
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in parameters):
        raise BadRow("wrong tools", "has a parameter without name", field=field)
    needed = [each["name"] for each in parameters if each in required or each.get("required") is True]
    properties = {
        each["name"]: {key: value for key, value in each.items() if key not in {"name", "required"}}
        for each in parameters
    }
    return {"type": "object", "properties": properties, **({"required": needed} if needed else {})}


def _object_schema(schema: object, field: str) -> dict[str, Any]:
    """Return the JSON schema of an object; xLAM's and Cohere's parameters are its bare properties."""
    if not isinstance(schema, dict):
        raise BadRow("wrong tools", f"has parameters that are {json_type(schema)}, not a JSON schema", field=field)
    if isinstance(schema.get("type"), str):
        return schema
    if isinstance(schema.get("properties"), dict):
        return {"type": "object", **{key: value for key, value in schema.items() if key != "type"}}
    return {"type": "object", "properties": schema}


def check_tools_rendered(tools: Sequence[ToolSchema], text: str, *, without_tools: str) -> None:
    """Check that a rendered conversation contains the name of every tool.

    Args:
        tools: the schemas.
        text: the rendering with the schemas.
        without_tools: the rendering of the same messages without them: tool calls in the messages have names too.

    Raises:
        BadRow: a name does not occur more often with the schemas than without them.
    """
    for tool in tools:
        name = tool["function"]["name"]
        pattern = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
        if len(pattern.findall(text)) <= len(pattern.findall(without_tools)):
            raise BadRow("tool omitted by the chat template", f"the chat template omits the tool {name}", field="tools")
