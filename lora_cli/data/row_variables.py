"""Read the template variables that a row has for itself, in its column `chat_template_kwargs`. Pure: no templates."""

from typing import Any

from lora_cli.data.readers import json_type, parse_json_field
from lora_cli.data.records import BadRow

KWARGS_COLUMN = "chat_template_kwargs"  # by the name that servers use


def row_variables(value: object) -> dict[str, Any]:
    """Return the template variables of a row's `chat_template_kwargs` column; nulls are not set.

    Raises:
        BadRow: the column is not an object.
    """
    if isinstance(value, BadRow):  # of a table
        raise value
    if isinstance(value, str):  # as in a table
        value = parse_json_field(value, field=KWARGS_COLUMN) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        problem = f'is {json_type(value)}, not an object such as {{"enable_thinking": false}}'
        raise BadRow("wrong template variables", problem, field=KWARGS_COLUMN)
    for name, each in value.items():
        if isinstance(each, str) and each.lower() in ("true", "false"):
            problem = f"is the text {each!r}, which a template reads as true: remove the quotes"
            raise BadRow("wrong template variables", problem, field=f"{KWARGS_COLUMN}.{name}")
    return {name: each for name, each in value.items() if each is not None}
