"""Find the assistant turns of a conversation rendered with a chat template, for the label mask. No tensors.

The span of a turn starts after the header that `add_generation_prompt` writes, and ends after its end-of-turn token.
A row whose spans are not certain is rejected. There are three ways to find spans, each tested on probe conversations
before the first row:

blocks  the `{% generation %}` blocks of the template;
prefix  the rendering of the first messages is a prefix of the full rendering, and its length is the turn's border;
scan    for templates that write earlier turns differently from the last one: find each header. A header contains a
        control token, which no message may contain (such rows are rejected), so each one starts an assistant turn.
"""

import json
import re
from itertools import pairwise
from typing import Any, NamedTuple

from lora_cli.data.chat_templates import Template, render_template, render_with_generation_blocks
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError


class AssistantFormat(NamedTuple):
    """How a template writes assistant turns, inferred from probe conversations."""

    template: Template
    has_generation_blocks: bool  # the template contains {% generation %}
    header: str  # the start of an assistant turn; empty if a turn follows the user's text directly
    end_tokens: re.Pattern[str]  # end-of-turn tokens
    control_tokens: re.Pattern[str]  # tokens that structure a conversation, which no message may contain
    supports_tools: bool


class Span(NamedTuple):
    """A range from `start` up to, not including, `stop`: of characters in a text, or of tokens in a row."""

    start: int
    stop: int


class RenderedChat(NamedTuple):
    """A rendered conversation with the spans of its assistant turns."""

    text: str
    turns: list[Span]  # in characters
    rewritten: int  # answers that the template changed


def render_with_spans(format_: AssistantFormat, chat: Conversation) -> RenderedChat:
    """Render `chat` with one span per assistant turn, in order, not overlapping, each with its end-of-turn token.

    Raises:
        BadRow: the spans are not certain, or the template omits a part of the row.
    """
    if match := format_.control_tokens.search(_all_text(chat)):
        problem = f"contains the control token {match[0]}, which the model would read as the start or end of a turn"
        raise BadRow("control token in the text", problem)
    if format_.has_generation_blocks:
        text, blocks = render_with_generation_blocks(format_.template, chat.messages, chat.tools)
        spans = [_span_with_end(format_, text, start, stop) for start, stop in blocks]
    else:
        text = render_template(format_.template, chat.messages, chat.tools)
        spans = _spans_by_prefix(format_, chat, text) or _spans_by_scan(format_, chat, text)
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    if len(spans) != len(answers):
        problem = f"the chat template writes {len(spans)} answers for {len(answers)} assistant messages"
        raise BadRow("answers not found", problem)
    for before, after in pairwise(spans):
        if before.stop > after.start:
            raise BadRow("answers not found", "the answers overlap in the text that the chat template writes")
    for message in chat.messages:
        if message["role"] in {"system", "developer", "user"} and message["content"].strip() not in text:
            raise BadRow("text omitted by the chat template", f"the chat template omits the {message['role']} message")
    rewritten = (_is_rewritten(answer, text[a:b], text) for answer, (a, b) in zip(answers, spans, strict=True))
    return RenderedChat(text, spans, sum(rewritten))


def _all_text(chat: Conversation) -> str:
    parts = [message["content"] for message in chat.messages]
    # Tool calls, reasoning, names: other fields that a template may write.
    rest = [{k: v for k, v in m.items() if k not in {"role", "content"}} for m in chat.messages]
    return "\0".join([*parts, json.dumps([rest, chat.tools], ensure_ascii=False, default=str)])


def _spans_by_prefix(format_: AssistantFormat, chat: Conversation, text: str) -> list[Span]:
    """Return the spans; empty if the rendering of the first messages is not a prefix of the full rendering."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        last = index + 1 == len(chat.messages)
        try:
            head = render_template(format_.template, chat.messages[:index], chat.tools, generation_prompt=True)
            turn = text if last else render_template(format_.template, chat.messages[: index + 1], chat.tools)
        except BadRow:
            return []  # the template accepts complete conversations only
        if not (text.startswith(head) and text.startswith(turn) and len(head) < len(turn)):
            return []
        spans.append(_span_with_end(format_, text, len(head), len(turn)))
    return spans


def _spans_by_scan(format_: AssistantFormat, chat: Conversation, text: str) -> list[Span]:
    if not format_.control_tokens.search(format_.header):
        return []
    starts = [match.end() for match in re.finditer(re.escape(format_.header), text)]
    return [_span_with_end(format_, text, start, None) for start in starts]


def _span_with_end(format_: AssistantFormat, text: str, start: int, stop: int | None) -> Span:
    """Return the span from `start` to its end-of-turn token; only white space may be between that token and `stop`."""
    end = format_.end_tokens.search(text, start)
    between = (text[end.end() : stop] or text[stop : end.start()]) if end and stop is not None else ""
    if end is None or between.strip():
        raise BadRow("no end-of-turn token", "the chat template writes an answer without an end-of-turn token")
    return Span(start, end.end())


def _is_rewritten(message: Message, span: str, text: str) -> bool:
    for call in message.get("tool_calls", []):
        if call["function"]["name"] not in span:
            raise BadRow("text omitted by the chat template", "the chat template omits the assistant's tool_calls")
    content = message["content"].strip()
    if content not in span and content in text:
        raise BadRow("answers not found", "an answer is not in its assistant turn")
    reasoning = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    return any(isinstance(part, str) and part.strip() not in span for part in (content, *reasoning))


# --- inferring and testing the format -------------------------------------------------------------------------------


def infer_template_format(template: Template, *, special: set[str], bos: str | None) -> AssistantFormat:
    """Infer how a template writes assistant turns, and test the result on probe conversations.

    Args:
        template: the chat template.
        special: texts of the tokenizer's special tokens.
        bos: text of its BOS token, if it has one.

    Raises:
        LoraError: labels would not be exact with this template.
    """
    tokens = _any_of(special)
    tools = [_tool("probe_tool")]
    probes = _probes()
    texts = [_try_render(template, chat) for chat in probes]
    rendered = [(chat, text) for chat, text in zip(probes, texts, strict=True) if isinstance(text, str)]
    if not rendered:
        errors = [_problem(text) for text in texts if isinstance(text, BadRow)]
        raise _unusable(template, errors[0], hint="use another template, or fix this one")
    header = _infer_header(template, rendered[0][0])
    ends = set()
    for chat, text in rendered:
        if bos and text.startswith(bos + bos):
            raise _unusable(template, f"it writes two {bos} at the start", hint="remove one from the template")
        ends |= {
            _end_token(template, tokens, text, message) for message in chat.messages if message["role"] == "assistant"
        }
    tool_call = _try_render(template, Conversation([{"role": "user", "content": "probe"}, _call("probe_tool")], tools))
    if isinstance(tool_call, str) and "probe_argument" in tool_call:
        end = tokens.search(tool_call, tool_call.rindex("probe_argument"))
        ends |= {end[0]} if end else set()  # some models end a turn with a tool call with a different token
    with_tools = _try_render(template, Conversation(rendered[0][0].messages, tools))
    format_ = AssistantFormat(
        template=template,
        has_generation_blocks=re.search(r"{%-?\s*generation\s*-?%}", template.source) is not None,
        header=header,
        end_tokens=_any_of(ends),
        control_tokens=_any_of(
            {token for token in special if token in template.source} | ends | ({bos} if bos else set())
        ),
        supports_tools=isinstance(with_tools, str) and "probe_tool" in with_tools,
    )
    for number, (chat, _) in enumerate(rendered):
        _check_spans(format_, chat, simplest=number == 0)
    return format_


def _check_spans(format_: AssistantFormat, chat: Conversation, *, simplest: bool) -> None:
    """Raise a LoraError unless every span contains its own answer and no other message.

    Only the simplest conversation has to be rendered without error. If a template omits system messages, for example,
    only the rows with a system message are rejected, and the data may have none.
    """
    answers = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    try:
        rendered = render_with_spans(format_, chat)
    except BadRow as bad:
        if not simplest:
            return
        raise _unusable(format_.template, _problem(bad), hint="mark its answers with {% generation %}") from None
    for answer, (start, stop) in zip(answers, rendered.turns, strict=True):
        span = rendered.text[start:stop]
        others = [m["content"] for m in chat.messages if m["content"] != answer and m["content"] in span]
        if answer not in span or others:
            raise _unusable(format_.template, "answers and questions cannot be separated", hint="use another template")
        if not format_.has_generation_blocks and not format_.header and span[: span.index(answer)].strip():
            raise _unusable(
                format_.template,
                "it ignores add_generation_prompt, so the start of an answer is unknown",
                hint="write the assistant header if add_generation_prompt is set, or use {% generation %} blocks",
            )


def _probes() -> list[Conversation]:
    def turns(count: int) -> list[Message]:
        return [
            {"role": role, "content": f"{role} probe {number} text"}
            for number in range(count)
            for role in ("user", "assistant")
        ]

    system: Message = {"role": "system", "content": "system probe text"}
    return [Conversation(messages, None) for messages in (turns(1), [system, *turns(1)], turns(3), [system, *turns(3)])]


def _call(name: str) -> Message:
    function = {"name": name, "arguments": {"key": "probe_argument"}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "probe0000", "function": function}],
    }


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}}
    return {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": parameters}}


def _try_render(template: Template, chat: Conversation) -> str | BadRow:
    try:
        return render_template(template, chat.messages, chat.tools)
    except BadRow as bad:
        return bad


def _infer_header(template: Template, chat: Conversation) -> str:
    prompt = chat.messages[:-1]
    try:
        plain, with_header = (render_template(template, prompt, generation_prompt=value) for value in (False, True))
    except BadRow:
        return ""
    return with_header[len(plain) :] if with_header.startswith(plain) else ""


def _end_token(template: Template, tokens: re.Pattern[str], text: str, answer: Message) -> str:
    position = text.find(answer["content"])
    if position < 0:
        raise _unusable(template, "it omits an answer", hint="use another template")
    rest = text[position + len(answer["content"]) :]
    end = tokens.match(rest.lstrip())
    if end is None:
        found = repr(rest[:20]) if rest else "nothing"
        raise _unusable(
            template,
            f"expected an end-of-turn token after an answer, found {found}",
            hint="without it the model does not learn to stop: write {{ eos_token }} after the answer",
        )
    return end[0]


def _problem(bad: BadRow) -> str:
    return bad.problem.replace("the chat template", "it", 1)


def _unusable(template: Template, reason: str, *, hint: str) -> LoraError:
    return LoraError(f"{template.name} cannot be used for training: {reason}", hint=hint)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    # Longest first, as in tokenizers. For an empty set, the pattern matches nothing.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=lambda t: (-len(t), t))) or "(?!)")
