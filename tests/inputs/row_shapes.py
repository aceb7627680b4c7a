"""Rows as other tools take them (axolotl, LLaMA-Factory, ms-swift, TRL, OpenAI, Anthropic, ...), and what each becomes.

Shapes with a result give the text that the model sees, turns separated by spaces, tokens with loss in [[ ]].
"""
# ruff: noqa: E501

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A row with the data section that it needs, and its result."""

    row: dict[str, Any]
    text: str
    section: Mapping[str, Any] = MappingProxyType({})
    unread: tuple[str, ...] = ()  # lines of the ledger


class Refused(NamedTuple):
    """A row that is refused, with the message's line of the row and the hint."""

    row: dict[str, Any]
    line: str  # after `train.jsonl:1: `
    hint: str
    section: Mapping[str, Any] = MappingProxyType({})


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHAT = [USER, ANSWER]
HI = "user:Hi [[Yo]]"
WEATHER = {
    "name": "weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = 'tools:{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
USED = f"user:Hi [[{CALL}]] tool:18 [[Warm]]"
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def called(call: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    return [USER, call, result, {"role": "assistant", "content": "Warm"}]


USED_CHAT = called(
    {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "18"},
)

SHAPES: dict[str, Shape] = {
    # plain conversations
    "messages": Shape({"messages": CHAT}, HI),
    "messages with a system column (axolotl, ms-swift)": Shape({"messages": CHAT, "system": "S"}, f"system:S {HI}"),
    "the same system message twice": Shape(
        {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "S"}, f"system:S {HI}"
    ),
    "sharegpt": Shape({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, HI),
    "sharegpt with a system turn": Shape(
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yo"},
            ]
        },
        f"system:S {HI}",
    ),
    "role and content in conversations": Shape({"conversations": CHAT}, HI),
    "role and value": Shape(
        {"conversations": [{"role": "user", "value": "Hi"}, {"role": "assistant", "value": "Yo"}]}, HI
    ),
    "from and content": Shape(
        {"conversations": [{"from": "user", "content": "Hi"}, {"from": "assistant", "content": "Yo"}]}, HI
    ),
    "speaker and text": Shape(
        {"conversations": [{"speaker": "human", "text": "Hi"}, {"speaker": "bot", "text": "Yo"}]}, HI
    ),
    "from and value in messages": Shape(
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, HI
    ),
    "mixed within a row": Shape({"messages": [{"from": "human", "value": "Hi"}, ANSWER]}, HI),
    "roles with capitals": Shape(
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Yo"}]}, HI
    ),
    "nulls of the other names (Arrow)": Shape(
        {
            "messages": [
                {"role": "user", "content": "Hi", "from": None, "value": None},
                {"role": None, "content": None, "from": "gpt", "value": "Yo"},
            ]
        },
        HI,
    ),
    "messages as JSON text": Shape(
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]'}, HI
    ),
    "Gemini contents": Shape(
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yo"}]}]},
        HI,
        {"columns": {"messages": "contents"}, "format": "messages"},
    ),
    "OpenAI Responses parts": Shape(
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Yo"}]},
            ]
        },
        HI,
    ),
    "axolotl input_output style segments as messages": Shape(
        {"messages": [{"role": "user", "content": "Hi", "name": None}, ANSWER]}, HI
    ),
    "TRL prompt-completion of messages": Shape({"prompt": [USER], "completion": [ANSWER]}, HI),
    "TRL prompt-completion of messages as JSON text": Shape(
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, HI
    ),
    "literal JSON as prompt and completion": Shape(
        {"prompt": '[{"a": 1}]', "completion": '[{"role": "x"}]'}, '[{"a": 1}][[[{"role": "x"}]<|im_end|>'
    ),
    "TRL prompt-completion of from and value": Shape(
        {"prompt": [{"from": "human", "value": "Hi"}], "completion": [{"from": "gpt", "value": "Yo"}]}, HI
    ),
    # names from the recipe
    "message_fields": Shape(
        {"messages": [{"who": "user", "said": "Hi"}, {"who": "assistant", "said": "Yo"}]},
        HI,
        {"message_fields": {"role": "who", "content": "said"}},
    ),
    "message_fields and roles": Shape(
        {"conversations": [{"who": "Q", "said": "Hi"}, {"who": "A", "said": "Yo"}]},
        HI,
        {"message_fields": {"role": "who", "content": "said"}, "roles": {"Q": "user", "A": "assistant"}},
    ),
    "message_fields over a common name": Shape(
        {
            "messages": [
                {"role": "user", "content": "no", "value": "Hi"},
                {"role": "assistant", "content": "no", "value": "Yo"},
            ]
        },
        HI,
        {"message_fields": {"content": "value"}},
        ("message keys not used: content beside value (2 messages)",),
    ),
    "roles over a common name": Shape(
        {"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Yo"}]},
        HI,
        {"roles": {"gpt": "user", "human": "assistant"}},
    ),
    "fields of a source": Shape(
        {"messages": [{"who": "user", "said": "Hi"}, {"who": "x", "said": "Yo"}]},
        HI,
        {
            "train": [
                {
                    "path": "train.jsonl",
                    "message_fields": {"role": "who", "content": "said"},
                    "roles": {"x": "assistant"},
                }
            ]
        },
    ),
    "roles of history": Shape(
        {"query": "Hi", "response": "Yo", "history": [{"role": "Q", "content": "a"}, {"role": "A", "content": "b"}]},
        f"user:a [[b]] {HI}",
        {"roles": {"Q": "user", "A": "assistant"}},
    ),
    # single questions
    "alpaca": Shape({"instruction": "Hi", "input": "", "output": "Yo"}, HI),
    "alpaca with pairs as history": Shape(
        {"instruction": "Hi", "output": "Yo", "history": [["a", "b"]]}, f"user:a [[b]] {HI}"
    ),
    "ms-swift query, response": Shape({"query": "Hi", "response": "Yo"}, HI),
    "ms-swift with system and history": Shape(
        {"system": "S", "query": "Hi", "response": "Yo", "history": [["a", "b"]]}, f"system:S user:a [[b]] {HI}"
    ),
    "history of messages": Shape(
        {
            "query": "Hi",
            "response": "Yo",
            "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        },
        f"user:a [[b]] {HI}",
    ),
    "history null": Shape({"query": "Hi", "response": "Yo", "history": None, "system": None}, HI),
    "question, answer as the hint says": Shape(
        {"question": "Hi", "answer": "Yo"},
        HI,
        {"format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
    ),
    # tools and calls
    "OpenAI tool calls": Shape(
        {"messages": USED_CHAT, "tools": [{"type": "function", "function": WEATHER}]}, f"{TOOL} {USED}"
    ),
    "tool calls without tools": Shape({"messages": USED_CHAT}, USED),
    "flat tools (OpenAI Responses)": Shape(
        {"messages": USED_CHAT, "tools": [{"type": "function", **WEATHER}]}, f"{TOOL} {USED}"
    ),
    "bare functions": Shape({"messages": USED_CHAT, "tools": [WEATHER]}, f"{TOOL} {USED}"),
    "function without type": Shape({"messages": USED_CHAT, "tools": [{"function": WEATHER}]}, f"{TOOL} {USED}"),
    "one tool as an object": Shape({"messages": USED_CHAT, "tools": WEATHER}, f"{TOOL} {USED}"),
    "Anthropic input_schema": Shape(
        {
            "messages": USED_CHAT,
            "tools": [{"name": "weather", "description": "d", "input_schema": WEATHER["parameters"]}],
        },
        f"{TOOL} {USED}",
    ),
    "MCP inputSchema": Shape(
        {
            "messages": USED_CHAT,
            "tools": [{"name": "weather", "description": "d", "inputSchema": WEATHER["parameters"]}],
        },
        f"{TOOL} {USED}",
    ),
    "Gemini function_declarations": Shape(
        {"messages": USED_CHAT, "tools": [{"function_declarations": [WEATHER]}]}, f"{TOOL} {USED}"
    ),
    "tools as JSON text (LLaMA-Factory, xLAM)": Shape(
        {
            "messages": USED_CHAT,
            "tools": '[{"name": "weather", "description": "d", "parameters": {"city": {"type": "string"}}}]',
        },
        f"{TOOL} {USED}",
    ),
    "each tool as JSON text": Shape(
        {
            "messages": USED_CHAT,
            "tools": ['{"name": "weather", "description": "d", "parameters": {"city": {"type": "string"}}}'],
        },
        f"{TOOL} {USED}",
    ),
    "ToolBench parameters": Shape(
        {
            "messages": USED_CHAT,
            "tools": [
                {
                    "api_name": "weather",
                    "api_description": "d",
                    "required_parameters": [{"name": "city", "type": "string"}],
                    "optional_parameters": [],
                }
            ],
        },
        TOOL.replace("}}}}}", '}}, "required": ["city"]}}}') + f" {USED}",
    ),
    "OpenAI functions and function_call": Shape(
        {
            "messages": called(
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
                },
                {"role": "function", "name": "weather", "content": "18"},
            ),
            "functions": [WEATHER],
        },
        f"{TOOL} {USED}",
    ),
    "function_call null": Shape({"messages": [USER, {**ANSWER, "function_call": None}]}, HI),
    "LLaMA-Factory function_call, observation": Shape(
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "18"},
                {"from": "gpt", "value": "Warm"},
            ],
            "tools": [WEATHER],
        },
        f"{TOOL} {USED}",
    ),
    "ms-swift tool_call, tool_response": Shape(
        {
            "messages": called(
                {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"role": "tool_response", "content": "18"},
            )
        },
        USED,
    ),
    "ms-swift calls in parallel, after text": Shape(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "So"},
                *[{"role": "tool_call", "content": {"name": "weather", "arguments": {"city": "Paris"}}}] * 2,
                *[{"role": "tool_response", "content": "18"}] * 2,
                {"role": "assistant", "content": "Warm"},
            ]
        },
        f"user:Hi [[So{CALL}{CALL}]] tool:18 tool:18 [[Warm]]",
    ),
    "Anthropic tool_use, tool_result": Shape(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "So"},
                        {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Paris"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "18"}]},
                        {"type": "text", "text": "And?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Warm"}]},
            ]
        },
        f"user:Hi [[So{CALL}]] tool:18 user:And? [[Warm]]",
    ),
    "Anthropic results of two calls": Shape(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": str(i), "name": "weather", "input": {"city": "Paris"}}
                        for i in range(2)
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": str(i), "content": "18"} for i in range(2)],
                },
                {"role": "assistant", "content": "Warm"},
            ]
        },
        f"user:Hi [[{CALL}{CALL}]] tool:18 tool:18 [[Warm]]",
    ),
    "Gemini functionCall": Shape(
        {
            "messages": [
                USER,
                {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"city": "Paris"}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"t": 18}}}]},
                {"role": "model", "parts": [{"text": "Warm"}]},
            ]
        },
        f'user:Hi [[{CALL}]] tool:{{"t": 18}} [[Warm]]',
    ),
    "calls with parameters (Llama)": Shape(
        {
            "messages": called(
                {"role": "assistant", "tool_calls": [{"name": "weather", "parameters": {"city": "Paris"}}]},
                {"role": "tool", "content": "18"},
            )
        },
        USED,
    ),
    "calls as JSON text": Shape(
        {
            "messages": called(
                {"role": "assistant", "tool_calls": '[{"name": "weather", "arguments": {"city": "Paris"}}]'},
                {"role": "tool", "content": "18"},
            )
        },
        USED,
    ),
    "Hermes calls in the text": Shape(
        {"messages": called({"role": "assistant", "content": CALL}, {"role": "tool", "content": "18"})}, USED
    ),
    "parameters as JSON text (tables)": Shape(
        {
            "messages": USED_CHAT,
            "tools": [{"type": "function", "function": {**WEATHER, "parameters": json.dumps(WEATHER["parameters"])}}],
        },
        f"{TOOL} {USED}",
    ),
    "no calls, in the forms of tables": Shape(
        {"messages": [{**USER, "tool_calls": ""}, {**ANSWER, "tool_calls": "[]"}], "tools": " "}, HI
    ),
    "blank reasoning": Shape(
        {"messages": [USER, {**ANSWER, "reasoning_content": "", "thinking": " "}]}, HI, {"on_bad_row": "error"}
    ),
    "one reasoning in two fields": Shape(
        {"messages": [USER, {**ANSWER, "reasoning_content": "R", "reasoning": "R\n"}]},
        "user:Hi [[<think>\nR\n</think>\n\nYo]]",
    ),
    "template variables as an empty cell": Shape({"messages": CHAT, "chat_template_kwargs": ""}, HI),
    # columns and keys that nothing reads
    "columns that are not used": Shape(
        {"messages": CHAT, "id": 7, "score": 0.5, "empty": None, "tags": []},
        HI,
        {},
        ("columns not used: id (1 row), score (1 row)",),
    ),
    "keys that are not used": Shape(
        {"messages": [{**USER, "time": 3, "name": "Eve"}, {**ANSWER, "time": 4, "audio": None}]},
        HI,
        {},
        ("message keys not used: name (1 message), time (2 messages)",),
    ),
    "images of messages left out on purpose": Shape(
        {"messages": [{**USER, "images": ["a.png"]}, ANSWER]},
        HI,
        {"columns": {"images": None}},
        ("message keys not used: images (1 message)",),
    ),
    "empty images of messages": Shape(
        {"messages": [{**USER, "images": []}, {**ANSWER, "audio": False}]},
        HI,
        {},
        ("message keys not used: audio (1 message), images (1 message)",),
    ),
    "tools of a message, which templates read from the row": Shape(
        {"messages": [{**USER, "tools": [WEATHER]}, ANSWER]}, HI, {}, ("message keys not used: tools (1 message)",)
    ),
    "keys of parts and calls": Shape(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "x"}}]},
                {"role": "assistant", "tool_calls": [{**OPENAI_CALL, "index": 0}]},
                {"role": "tool", "content": "18"},
                {"role": "assistant", "content": "Warm"},
            ]
        },
        USED,
        {},
        ("message keys not used: content[].cache_control (1 message), tool_calls[].index (1 message)",),
    ),
    # columns that could change the meaning, with values that do not
    "KTO: a good answer": Shape({"messages": CHAT, "label": True}, HI, {}, ("columns not used: label (1 row)",)),
    "empty images, rejected null, weight 1": Shape(
        {"messages": CHAT, "images": [], "image": {"bytes": None, "path": None}, "rejected": None, "weight": 1},
        HI,
        {},
        ("columns not used: weight (1 row)",),
    ),
    "a class as label": Shape(
        {"query": "Hi", "response": "Yo", "label": 0}, HI, {}, ("columns not used: label (1 row)",)
    ),
    "images left out on purpose": Shape(
        {"messages": [{"role": "user", "content": "<image>\nHi"}, ANSWER], "images": ["a.png"]},
        "user:<image>\nHi [[Yo]]",
        {"columns": {"images": None}},
    ),
    "a bad answer on purpose": Shape({"messages": CHAT, "label": False}, HI, {"columns": {"label": None}}),
    "chosen answers on purpose": Shape(
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        HI,
        {"format": "alpaca", "columns": {"instruction": "prompt", "output": "chosen"}},
        ("columns not used: rejected (1 row)",),
    ),
    "HTML in a question": Shape(
        {"query": "What does <video>x</video> do, and <image> in SVG?", "response": "Yo"},
        "user:What does <video>x</video> do, and <image> in SVG? [[Yo]]",
    ),
}

BAD_ANSWER = (
    "to learn the good answers only: data: {on_bad_row: skip, max_loss: 1.0}, which drops and counts the others; "
)
LEAVE_OUT = "data.columns: {COLUMN: null} leaves the column out on purpose"
MASK = "is a mask of the tokens that carry loss, which this format does not read"
MASK_HINT = f"write rows of format tokens: input_ids, and labels with -100 for a token without loss; {LEAVE_OUT}"
WORSE = "is the worse of two answers (a preference pair), which supervised fine-tuning does not use"
CHOSEN = "to train on the chosen answers: "
USUAL = "fix them, or set data.on_bad_row: skip to drop and count them"


def media(column: str, value: object, medium: str) -> Refused:
    hint = f"data.columns: {{{column}: null}} trains on the text alone; data.on_bad_row: skip drops these rows"
    return Refused(
        {"messages": CHAT, column: value}, f"{column}: the row has {medium}, which a text model does not see", hint
    )


def kto(column: str, value: object, row: dict[str, Any] | None = None, **section: Any) -> Refused:
    as_in = " (as in KTO)" if value in {False, "False", "false", "0"} else ""
    written = repr(value).lower() if isinstance(value, bool) else repr(value)
    problem = f"{column}: is {written}: the answer is marked as a bad one{as_in}"
    return Refused(
        {**(row or {"messages": CHAT}), column: value},
        problem,
        BAD_ANSWER + LEAVE_OUT.replace("COLUMN", column),
        section,
    )


def pair(row: dict[str, Any], rejected: str, hint: str, **section: Any) -> Refused:
    return Refused(row, f"{rejected}: {WORSE}", CHOSEN + hint, section)


def placeholder(row: dict[str, Any], where: str, text: str, medium: str, name: str) -> Refused:
    hint = f"data.on_bad_row: skip drops these rows; data.columns: {{{name}: null}} keeps it as text"
    return Refused(row, f"{where}: contains {text}, which stands for {medium}", hint)


LITERAL = {"prompt": "Hi", "completion": "Yo"}
REFUSED: dict[str, Refused] = {
    # KTO
    "TRL's KTO": kto("label", False, LITERAL),
    "KTO with the format set": kto("label", False, LITERAL, format="prompt-completion"),
    "KTO with mapped columns": kto(
        "label", False, {"q": "Hi", "a": "Yo"}, format="alpaca", columns={"instruction": "q", "output": "a"}
    ),
    "LLaMA-Factory's KTO": kto("kto_tag", False, {"instruction": "Hi", "output": "Yo"}),
    "ms-swift's KTO": kto("label", False),
    "KTO in a table": kto("label", "False", {"query": "Hi", "response": "Yo"}),
    "is_correct": kto("is_correct", False),
    "rejected as a flag": kto("rejected", True),
    "thumbs down": kto("feedback", "thumbs_down"),
    "is_good 0": kto("is_good", 0),
    "desirable 0 in a table": kto("desirable", "0", {"query": "Hi", "response": "Yo"}),
    "a row that is not trained on": Refused(
        {"messages": CHAT, "train": False},
        "train: is false: the row is marked as one that carries no loss",
        f"data: {{on_bad_row: skip, max_loss: 1.0}} drops and counts these rows; {LEAVE_OUT.replace('COLUMN', 'train')}",
    ),
    # preference pairs
    "TRL's preference": pair(
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        "rejected",
        "format: alpaca, columns: {instruction: prompt, output: chosen}",
    ),
    "preference of conversations": pair(
        {"chosen": CHAT, "rejected": CHAT}, "rejected", "format: messages, columns: {messages: chosen}"
    ),
    "preference with a prompt of messages": pair(
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        "rejected",
        "format: prompt-completion, columns: {completion: chosen}",
    ),
    "HH-RLHF": pair(
        {"chosen": "Human: Hi", "rejected": "Human: Hi"},
        "rejected",
        "with their prompts: format: text, columns: {text: chosen}",
    ).__class__(
        {"chosen": "Human: Hi", "rejected": "Human: Hi"},
        f"rejected: {WORSE}",
        "to train on the chosen answers, with their prompts: format: text, columns: {text: chosen}",
    ),
    "LLaMA-Factory's ranking of alpaca": pair(
        {"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"},
        "rejected",
        "format: alpaca, columns: {output: chosen}",
    ),
    "LLaMA-Factory's ranking of sharegpt": pair(
        {"conversations": [*CHAT, USER], "chosen": ANSWER, "rejected": ANSWER},
        "rejected",
        "write rows of messages that end with chosen",
    ),
    "ORPO with system and question": pair(
        {"system": "S", "question": "Hi", "chosen": "Yo", "rejected": "No"},
        "rejected",
        "format: alpaca, columns: {instruction: question, output: chosen}",
    ),
    "ms-swift's rejected_response": pair(
        {"messages": CHAT, "rejected_response": "No"}, "rejected_response", "data.columns: {rejected_response: null}"
    ),
    "ms-swift's query and rejected_response": pair(
        {"query": "Hi", "response": "Yo", "rejected_response": "No"},
        "rejected_response",
        "data.columns: {rejected_response: null}",
    ),
    "OpenAI's preference": pair(
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        "non_preferred_output",
        "write rows of messages that end with preferred_output",
    ),
    "response_j and response_k": pair(
        {"question": "Hi", "response_j": "Yo", "response_k": "No"},
        "response_k",
        "format: alpaca, columns: {instruction: question, output: response_j}",
    ),
    "winner and loser": pair(
        {"prompt": "Hi", "winner": "Yo", "loser": "No"},
        "loser",
        "format: alpaca, columns: {instruction: prompt, output: winner}",
    ),
    "other spellings": pair(
        {"prompt": "Hi", "chosenResponse": "Yo", "Rejected-Response": "No"},
        "Rejected-Response",
        "format: alpaca, columns: {instruction: prompt, output: chosenResponse}",
    ),
    "a pair beside messages": pair(
        {"messages": CHAT, "chosen": "Yo", "rejected": "No"}, "rejected", "data.columns: {rejected: null}"
    ).__class__(
        {"messages": CHAT, "chosen": "Yo", "rejected": "No"},
        f"rejected: {WORSE}",
        "to train on the chosen answers, with their prompts: format: text, columns: {text: chosen}",
    ),
    "response_0 and response_1": Refused(
        {"prompt": "Hi", "response_0": "Yo", "response_1": "No", "better_response_id": 0},
        "response_0, response_1: are two answers to one prompt, of which supervised fine-tuning uses one",
        "to learn the first: data.columns maps response_0, for example {output: response_0, response_1: null}",
    ),
    # images, videos, audio
    "images": media("images", ["a.png"], "an image"),
    "image of datasets": media("image", {"bytes": None, "path": "a.png"}, "an image"),
    "image_url": media("image_url", "https://x/a.png", "an image"),
    "pixel_values": media("pixel_values", [[0.5]], "an image"),
    "videos": media("videos", ["a.mp4"], "a video"),
    "audio": media("audio", {"array": [0.1], "sampling_rate": 16000}, "audio"),
    "audios": media("audios", ["a.wav"], "audio"),
    "images of text rows": Refused(
        {"text": "Hi", "images": ["a.png"]},
        "images: the row has an image, which a text model does not see",
        "data.columns: {images: null} trains on the text alone; data.on_bad_row: skip drops these rows",
    ),
    "images of a message (Ollama)": Refused(
        {"messages": [{**USER, "images": ["a.png"]}, ANSWER]},
        "the user message: has images: an image, which a text model does not see",
        "data.columns: {images: null} trains on the text alone; data.on_bad_row: skip drops these rows",
    ),
    "audio of an answer (OpenAI)": Refused(
        {"messages": [USER, {**ANSWER, "audio": {"id": "x"}}]},
        "the assistant message: has audio: audio, which a text model does not see",
        "data.columns: {audio: null} trains on the text alone; data.on_bad_row: skip drops these rows",
    ),
    "<image> in a question": placeholder(
        {"messages": [{"role": "user", "content": "<image>\nHi"}, ANSWER]},
        "the user message",
        "<image>",
        "an image",
        "image",
    ),
    "<image> at its end": placeholder(
        {"instruction": "Describe this: <image>", "output": "Yo"}, "the user message", "<image>", "an image", "image"
    ),
    "<image> in a literal prompt": placeholder(
        {"prompt": "<image>Hi", "completion": "Yo"}, "prompt", "<image>", "an image", "image"
    ),
    "<video>": placeholder(
        {"query": "<video>\nHi", "response": "Yo"}, "the user message", "<video>", "a video", "video"
    ),
    "<audio>": placeholder({"query": "<audio>\nHi", "response": "Yo"}, "the user message", "<audio>", "audio", "audio"),
    "Qwen's image token": placeholder(
        {"query": "a<|image_pad|>b", "response": "Yo"}, "the user message", "<|image_pad|>", "an image", "image"
    ),
    "an image part": Refused(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Hi"}],
                },
                ANSWER,
            ]
        },
        "messages[0].content[0]: is 'image_url': only text is supported",
        USUAL,
    ),
    # masks and weights
    "loss_mask beside ids": Refused(
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, f"loss_mask: {MASK}", MASK_HINT.replace("COLUMN", "loss_mask")
    ),
    "TRL's completion_mask": Refused(
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
        f"completion_mask: {MASK}",
        MASK_HINT.replace("COLUMN", "completion_mask"),
    ),
    "labels beside messages": Refused(
        {"messages": CHAT, "labels": [-100, 5]}, f"labels: {MASK}", MASK_HINT.replace("COLUMN", "labels")
    ),
    "position_ids of packed rows": Refused(
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]},
        "position_ids: does not count from 0: the row is packed already",
        f"write each document as a row of its own: data.packing packs them; {LEAVE_OUT.replace('COLUMN', 'position_ids')}",
    ),
    "weight": Refused(
        {"messages": CHAT, "weight": 0.5},
        "weight: is 0.5: rows have no weights of their own",
        "a source has one: list the rows of each weight as a source of data.train with `weight`; data.columns: {weight: null} leaves the column out on purpose",
    ),
    "sample_weight 0": Refused(
        {"text": "Hi", "sample_weight": 0},
        "sample_weight: is 0: rows have no weights of their own",
        "a source has one: list the rows of each weight as a source of data.train with `weight`; data.columns: {sample_weight: null} leaves the column out on purpose",
    ),
    # tools
    "tools and functions": Refused(
        {"messages": CHAT, "tools": [WEATHER], "functions": [WEATHER]},
        "functions: the row has tools and functions",
        USUAL,
    ),
    "tools of literal text": Refused(
        {**LITERAL, "tools": [WEATHER]},
        "tools: are for conversations: write prompt and completion as lists of messages",
        USUAL,
    ),
    "a tool without name": Refused(
        {"messages": CHAT, "tools": [{"type": "web_search"}]}, "tools[0]: is not a tool schema: it has no name", USUAL
    ),
    "parameters that are a number": Refused(
        {"messages": CHAT, "tools": [{"name": "f", "parameters": 3}]},
        "tools[0]: has parameters that are a number, not a JSON schema",
        USUAL,
    ),
    "function_call and tool_calls": Refused(
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [OPENAI_CALL]}]},
        "messages[1].function_call: the message has function_call and tool_calls",
        USUAL,
    ),
    "function_call of a user": Refused(
        {"messages": [{**USER, "function_call": {"name": "f", "arguments": "{}"}}, ANSWER]},
        "messages[0].tool_calls: only the assistant can call tools, not the user",
        USUAL,
    ),
    "function_call a number": Refused(
        {"messages": [USER, {"role": "assistant", "function_call": 3}]},
        "messages[1].function_call: is a number, not an object",
        USUAL,
    ),
    "tool_call that is no JSON": Refused(
        {"messages": [USER, {"role": "tool_call", "content": "weather()"}]},
        "messages[1].content: is a string, but not valid JSON",
        USUAL,
    ),
    "text after a tool_use": Refused(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "So"}],
                },
            ]
        },
        "messages[1].content[1]: is text after a tool call, which chat templates cannot write",
        USUAL,
    ),
    "a result without a call": Refused(
        {"messages": [USER, ANSWER, {"role": "user", "content": [{"type": "tool_result", "content": "18"}]}, ANSWER]},
        "messages[2].role: tool can only follow an assistant message with tool_calls",
        USUAL,
    ),
    # names
    "an unknown role": Refused(
        {"messages": [{"role": "narrator", "content": "x"}, ANSWER]},
        "messages[0].role: 'narrator' is not a role: known roles are system, developer, user, assistant, tool",
        "write which role it is: data.roles: {narrator: user}; or set data.on_bad_row: skip",
    ),
    "a field that the messages do not have": Refused(
        {"messages": CHAT}, "messages[0].said: is missing", USUAL, {"message_fields": {"content": "said"}}
    ),
    "a value under another key": Refused(
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "Yo"}]},
        "conversations[0].value: is a number, not a string",
        USUAL,
    ),
    "a value behind a merged turn": Refused(
        {
            "messages": [
                USER,
                ANSWER,
                {"role": "tool_call", "content": '{"name": "f"}'},
                {"role": "tool_response", "content": 3},
                ANSWER,
            ]
        },
        "messages[3].content: is a number, not a string",
        USUAL,
    ),
    "two system messages": Refused(
        {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "T"},
        "system: differs from the system message that the conversation starts with",
        USUAL,
    ),
    "history of triples": Refused(
        {"query": "Hi", "response": "Yo", "history": [["a", "b", "c"]]},
        "history[0]: is not a pair of question and answer",
        USUAL,
    ),
    "history that ends with a question": Refused(
        {"query": "Hi", "response": "Yo", "history": [{"role": "user", "content": "a"}]},
        "history[1].role: user cannot follow user",
        "fix them, or set data.merge_turns: true to join consecutive turns of one role, and count them",
    ),
    "a number in history": Refused(
        {"query": "Hi", "response": "Yo", "system": "S", "history": [["a", "b"], ["c", 3]]},
        "history[1][1]: is a number, not a string",
        USUAL,
    ),
    "an empty answer in history": Refused(
        {"query": "Hi", "response": "Yo", "system": "S", "history": [["a", "b"], ["c", " "]]},
        "history[1][1]: is empty: there is no answer to learn from",
        USUAL,
    ),
    "a message behind a system column": Refused(
        {"messages": [USER, {"role": "assistant", "content": 3}], "system": "S"},
        "messages[1].content: is a number, not a string",
        USUAL,
    ),
    "the order behind a system column": Refused(
        {"messages": [USER, ANSWER, ANSWER], "system": "S"},
        "messages[2].role: assistant cannot follow assistant",
        "fix them, or set data.merge_turns: true to join consecutive turns of one role, and count them",
    ),
    "no text and no call": Refused(
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": "[]"}]},
        "messages[1].content: is empty: there is no answer to learn from",
        USUAL,
    ),
    "a call without a name": Refused(
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "", "arguments": {}}]}]},
        "messages[1].tool_calls[0]: has no function name",
        USUAL,
    ),
    "a tool_use beside tool_calls that are no list": Refused(
        {"messages": [USER, {**ANSWER, "tool_calls": 5, "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
        "messages[1].tool_calls: is a number, not a list, and the content has tool calls too",
        USUAL,
    ),
    # reasoning
    "reasoning that is a list": Refused(
        {"messages": [USER, {**ANSWER, "reasoning_content": ["R"]}]},
        "messages[1].reasoning_content: is a list, not a string",
        USUAL,
    ),
    "two reasonings": Refused(
        {"messages": [USER, {**ANSWER, "reasoning_content": "R", "thinking": "S"}]},
        "messages[1]: reasoning_content and thinking differ: keep one",
        USUAL,
    ),
    "reasoning in a field and in the content": Refused(
        {"messages": [USER, {"role": "assistant", "content": "<think>R</think>Yo", "reasoning": "R"}]},
        "messages[1]: has reasoning in reasoning and, between <think> and </think>, in its content: keep one",
        USUAL,
    ),
    "reasoning in a field and in a block": Refused(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "reasoning_content": 3,
                    "content": [{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "Yo"}],
                },
            ]
        },
        "messages[1].content[0]: is reasoning, and the message has reasoning_content too: keep one",
        USUAL,
    ),
    "reasoning within a joined turn": Refused(
        {"messages": [USER, ANSWER, {"role": "assistant", "content": "<think>\nR\n</think>\n\nYo"}]},
        "messages[2].role: assistant cannot follow assistant: data.merge_turns cannot join them, because their other "
        "fields do not fit one turn",
        USUAL,
        {"merge_turns": True},
    ),
    "a quoted template variable": Refused(
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": "False"}},
        "chat_template_kwargs.enable_thinking: is the text 'False', which a template reads as true: remove the quotes",
        USUAL,
    ),
    "response null": Refused({"query": "Hi", "response": None}, "response: is null", USUAL),
    # columns of other names
    "dolly": Refused(
        {"instruction": "Hi", "context": "c", "response": "Yo", "category": "x"},
        "no known format has these columns: instruction, context, response, category",
        "write format: alpaca, columns: {output: response, input: context}, which keeps the model's chat template",
    ),
    "prompt and response": Refused(
        {"prompt": "Hi", "response": "Yo"},
        "no known format has these columns: prompt, response",
        "write format: alpaca, columns: {instruction: prompt, output: response}, which keeps the model's chat template",
    ),
    "input and output with a system prompt": Refused(
        {"system_prompt": "S", "input": "Hi", "output": "Yo"},
        "no known format has these columns: system_prompt, input, output",
        "write format: alpaca, columns: {instruction: input, system: system_prompt}, which keeps the model's chat template",
    ),
    "a conversation of another name": Refused(
        {"dialog": CHAT},
        "no known format has these columns: dialog",
        "write format: messages, columns: {messages: dialog}",
    ),
    "content of a document": Refused(
        {"content": "Hi", "url": "x"},
        "no known format has these columns: content, url",
        "write format: text, columns: {text: content}",
    ),
    "nothing recognized": Refused(
        {"a": "Hi", "b": "Yo"},
        "no known format has these columns: a, b",
        "map them with data.columns, for example format: alpaca, columns: {instruction: question, output: answer}",
    ),
}
