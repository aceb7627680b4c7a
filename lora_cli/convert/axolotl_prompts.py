"""axolotl's prompt types whose rows are an instruction and an answer: the columns, and the text around them. No torch.

Each type has a text of its own in axolotl (prompters.py, prompt_strategies/). One that is none of these is not offered.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_cli.convert.templates import prompt_template

Columns = dict[str, str | None]

_REQUEST = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately "
    "and concisely completes the request.\n\n"
)


class Prompt(NamedTuple):
    """A prompt type: rows are read by the format alpaca, and written by a chat template."""

    template: str  # a named template, or Jinja
    columns: Columns
    has_input: bool = True  # whether axolotl writes an input, with words of its own around it


def own_template(entry: Mapping[str, Any]) -> str | None:
    """Return the chat template of a type that the user wrote; None if a template cannot write its text.

    A message has the instruction, and below it the input.
    """
    text, plain = entry.get("format"), entry.get("no_input_format")
    if not entry.get("field_input"):
        text = plain or text
    elif plain is not None and plain != str(text).replace("\n{input}", ""):
        return None
    user = str(text).replace("{instruction}\n{input}", "{instruction}").replace("{instruction}", "{}")
    system = str(entry.get("system_format") or "").replace("{system}", "{}")
    if user.count("{}") != 1 or re.search(r"[{}]", user.replace("{}", "")):
        return None
    if system and (system.count("{}") != 1 or re.search(r"[{}]", system.replace("{}", ""))):
        return None
    fixed = "" if entry.get("field_system") or not system else str(entry.get("system_prompt") or "")
    return prompt_template(system, user, "", preamble=fixed)


def _chat(preamble: str = "") -> str:
    return prompt_template("SYSTEM: {}\n", "USER: {}\n", "ASSISTANT:", preamble=preamble)


_QUESTION: Columns = {"instruction": "question", "input": None, "output": "answer"}
_ORCA: Columns = {"instruction": "question", "input": None, "output": "response", "system": "system_prompt"}
_OASST: Columns = {"instruction": "INSTRUCTION", "input": None, "output": "RESPONSE"}
_TEACHER: Columns = {"output": "response"}
PROMPTS: dict[str, Prompt] = {
    "alpaca": Prompt("alpaca", {}),
    "alpaca:instruct": Prompt("alpaca", {}),
    "alpaca:chat": Prompt(_chat(_REQUEST), {}),
    "alpaca_instruct": Prompt("alpaca", {}),
    "alpaca_instruct.load_no_prompt": Prompt(
        prompt_template("{}", "### Instruction:\n{}\n\n", "### Response:\n"), {}
    ),
    "alpaca_chat": Prompt(_chat(_REQUEST), {}),
    "alpaca_chat.load_no_prompt": Prompt(_chat(), {}),
    "alpaca_chat.load_concise": Prompt(_chat(_CONCISE), {}),
    "alpaca_chat.load_qa": Prompt(_chat(_CONCISE), _QUESTION, has_input=False),
    "alpaca_chat.load_camel_ai": Prompt(
        _chat(_CONCISE), {"instruction": "message_1", "input": None, "output": "message_2"}, has_input=False
    ),
    "alpaca_w_system": Prompt(_chat(), {}),
    "alpaca_w_system.load_chat": Prompt(_chat(), {}),
    "alpaca_w_system.load_instruct": Prompt("alpaca", {}),
    "alpaca_w_system.load_open_orca": Prompt(
        prompt_template("### System:\n{}\n", "### Human:\n{}\n", "### Assistant:\n"), _ORCA, has_input=False
    ),
    "alpaca_w_system.load_open_orca_chatml": Prompt("chatml", _ORCA, has_input=False),
    "orcamini": Prompt(
        prompt_template("### System:\n{}\n\n", "### User:\n{}\n\n", "### Response:\n"), _ORCA, has_input=False
    ),
    "gpteacher": Prompt("alpaca", _TEACHER),
    "gpteacher:instruct": Prompt("alpaca", _TEACHER),
    "gpteacher:chat": Prompt(_chat(_REQUEST), _TEACHER),
    "oasst": Prompt("alpaca", _OASST, has_input=False),
    "oasst:instruct": Prompt("alpaca", _OASST, has_input=False),
    "oasst:chat": Prompt(_chat(_REQUEST), _OASST, has_input=False),
}  # fmt: skip
