"""Tokens and passwords in the configs of other tools: they are not shown. No torch."""

import re
from typing import Any

HIDDEN = "(not shown)"
# `eos_token` and the like are no secrets.
KEY = re.compile(
    r"(?i)((^|[_.])(hf|hub|hugging_?face|access|auth|api|login|wandb|github|bearer)_?token|^(.*\.)?token"
    r"|hugging_face_hub_token|api_?key|secret|passwo?r?d)$"
)
# In the forms in which services issue tokens, and in an address.
VALUE = re.compile(r"\bhf_\w{20,}|\b[0-9a-f]{40}\b|\bwandb_v\d_\w{20,}|\bsk-[\w-]{20,}|(?<=://)[^/@\s]+@")


def hide(key: str, value: Any) -> Any:
    """Return the value of a key, with (not shown) instead of each secret in it."""
    if isinstance(value, dict):
        return {name: hide(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hide(key, inner) for inner in value]
    if not isinstance(value, str):
        return value
    if KEY.search(key):
        return HIDDEN
    return type(value)(VALUE.sub(HIDDEN, value)) if VALUE.search(value) else value
