"""Find the assistant's turns in a rendered conversation, exactly or not at all. Text only, no tensors.

A turn's span starts behind the header that `add_generation_prompt` writes, and stops right behind its end-of-turn
token. Three ways lead there, each checked on probe conversations before the first row:

marks   the template's own `{% generation %}` blocks;
prefix  the rendering of the first messages is a prefix of the whole one, so its length is the turn's border;
scan    where a template writes earlier turns otherwise than the last one: the header contains a control token, which
        no message can contain (such rows are refused), and is there exactly once for each assistant turn.
"""

import json
import re
from itertools import pairwise
from typing import Any, NamedTuple

from lora_cli.data.chat_templates import Template, render_template, render_with_marks
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError


class AssistantFormat(NamedTuple):
    """How a template writes assistant turns, learnt from probe conversations."""

    template: Template
    has_generation_tags: bool  # it has {% generation %}
    header: str  # what it opens an assistant turn with; empty where a turn follows the user's text directly
    end_tokens: re.Pattern[str]  # its end-of-turn tokens
    control_tokens: re.Pattern[str]  # tokens that structure a conversation, which no message may contain
    takes_tools: bool


class Span(NamedTuple):
    """Characters `start` to `stop` of a rendering."""

    start: int
    stop: int


class RenderedChat(NamedTuple):
    """A conversation as text, with the assistant's turns in it."""

    text: str
    turns: list[Span]
    rewritten: int  # turns whose text the template did not write as it is in the row


def render_with_spans(format_: AssistantFormat, chat: Conversation) -> RenderedChat:
    """`chat` as text, with one span an assistant turn: in order, apart, each with an end-of-turn token at its end.

    Raises:
        BadRow: the spans cannot be proved, or the template leaves a part of the row out.
    """
    if found := format_.control_tokens.search(_everything(chat)):
        problem = f"contains the control token {found[0]}: the model would take it for the end or start of a turn"
        raise BadRow("control token in the text", problem)
    if format_.has_generation_tags:
        text, blocks = render_with_marks(format_.template, chat.messages, chat.tools)
        spans = [_closed(format_, text, start, stop) for start, stop in blocks]
    else:
        text = render_template(format_.template, chat.messages, chat.tools)
        spans = _by_prefix(format_, chat, text) or _by_scan(format_, chat, text)
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    if len(spans) != len(answers):
        problem = f"the chat template shows {len(spans)} answers for {len(answers)} assistant messages"
        raise BadRow("answers not found", problem)
    for before, after in pairwise(spans):
        if before.stop > after.start:
            raise BadRow("answers not found", "the chat template writes answers into each other")
    for message in chat.messages:
        if message["role"] in {"system", "developer", "user"} and message["content"].strip() not in text:
            raise BadRow("text left out", f"the chat template leaves the {message['role']} message out")
    rewritten = (_rewritten(answer, text[a:b], text) for answer, (a, b) in zip(answers, spans, strict=True))
    return RenderedChat(text, spans, sum(rewritten))


def _everything(chat: Conversation) -> str:
    parts = [message["content"] for message in chat.messages]
    # Calls, reasoning, names: whatever else a template may write.
    rest = [{k: v for k, v in m.items() if k not in {"role", "content"}} for m in chat.messages]
    return "\0".join([*parts, json.dumps([rest, chat.tools], ensure_ascii=False, default=str)])


def _by_prefix(format_: AssistantFormat, chat: Conversation, text: str) -> list[Span]:
    """The spans, or none where the template does not write the first messages as in the whole conversation."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        last = index + 1 == len(chat.messages)
        try:
            head = render_template(format_.template, chat.messages[:index], chat.tools, header=True)
            turn = text if last else render_template(format_.template, chat.messages[: index + 1], chat.tools)
        except BadRow:
            return []  # it takes whole conversations only
        if not (text.startswith(head) and text.startswith(turn) and len(head) < len(turn)):
            return []
        spans.append(_closed(format_, text, len(head), len(turn)))
    return spans


def _by_scan(format_: AssistantFormat, chat: Conversation, text: str) -> list[Span]:
    if not format_.control_tokens.search(format_.header):
        return []
    starts = [match.end() for match in re.finditer(re.escape(format_.header), text)]
    return [_closed(format_, text, start, None) for start in starts]


def _closed(format_: AssistantFormat, text: str, start: int, stop: int | None) -> Span:
    """The span from `start` to its end-of-turn token, which must be what `stop` borders on, blanks aside."""
    end = format_.end_tokens.search(text, start)
    between = (text[end.end() : stop] or text[stop : end.start()]) if end and stop is not None else ""
    if end is None or between.strip():
        raise BadRow("no end-of-turn token", "the chat template writes an answer without an end-of-turn token")
    return Span(start, end.end())


def _rewritten(message: Message, span: str, text: str) -> bool:
    for call in message.get("tool_calls", []):
        if call["function"]["name"] not in span:
            raise BadRow("text left out", "the chat template leaves the assistant's tool_calls out")
    content = message["content"].strip()
    if content not in span and content in text:
        raise BadRow("answers not found", "an answer is not where the chat template should write it")
    reasoning = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    return any(isinstance(part, str) and part.strip() not in span for part in (content, *reasoning))


# --- learning and proving the layout --------------------------------------------------------------------------------


def infer_template_format(template: Template, *, special: set[str], bos: str | None) -> AssistantFormat:
    """The layout of a template, proved on probe conversations.

    Args:
        template: the chat template.
        special: texts of the tokenizer's special tokens.
        bos: text of its BOS token, if it has one.

    Raises:
        LoraError: the template would break a promise about labels; says which.
    """
    tokens = _any_of(special)
    tools = [_tool("probe_tool")]
    probes = _probes()
    texts = [_attempt(template, chat) for chat in probes]
    readable = [(chat, text) for chat, text in zip(probes, texts, strict=True) if isinstance(text, str)]
    if not readable:
        refusals = [_about(text) for text in texts if isinstance(text, BadRow)]
        raise _unfit(template, refusals[0], hint="use another template, or mend this one")
    header = _header(template, readable[0][0])
    ends = set()
    for chat, text in readable:
        if bos and text.startswith(bos + bos):
            raise _unfit(template, f"it writes two {bos} at the start", hint="remove one from the template")
        ends |= {_end(template, tokens, text, message) for message in chat.messages if message["role"] == "assistant"}
    calling = Conversation([{"role": "user", "content": "probe"}, _calling("probe_tool")], tools)
    called = _attempt(template, calling)
    if isinstance(called, str) and "probe_argument" in called:
        end = tokens.search(called, called.rindex("probe_argument"))
        ends |= {end[0]} if end else set()  # some models end a turn that calls a tool with a token of its own
    shown = _attempt(template, Conversation(readable[0][0].messages, tools))
    format_ = AssistantFormat(
        template=template,
        has_generation_tags=re.search(r"{%-?\s*generation\s*-?%}", template.source) is not None,
        header=header,
        end_tokens=_any_of(ends),
        control_tokens=_any_of(
            {token for token in special if token in template.source} | ends | ({bos} if bos else set())
        ),
        takes_tools=isinstance(shown, str) and "probe_tool" in shown,
    )
    for number, (chat, _) in enumerate(readable):
        _prove(format_, chat, simplest=number == 0)
    return format_


def _prove(format_: AssistantFormat, chat: Conversation, *, simplest: bool) -> None:
    """Every span must hold its own answer and no other message.

    Only the simplest conversation must be readable: where a template leaves system messages out, say, the rows that
    have one are refused one by one, and may be none.
    """
    answers = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    try:
        found = render_with_spans(format_, chat)
    except BadRow as bad:
        if not simplest:
            return
        raise _unfit(format_.template, _about(bad), hint="mark its answers with {% generation %}") from None
    for answer, (start, stop) in zip(answers, found.turns, strict=True):
        span = found.text[start:stop]
        others = [m["content"] for m in chat.messages if m["content"] != answer and m["content"] in span]
        if answer not in span or others:
            raise _unfit(format_.template, "answers and questions cannot be told apart", hint="use another template")
        if not format_.has_generation_tags and not format_.header and span[: span.index(answer)].strip():
            raise _unfit(
                format_.template,
                "it ignores add_generation_prompt, so where an answer starts is unknown",
                hint="let it open the assistant's turn there, or mark answers with {% generation %}",
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


def _calling(name: str) -> Message:
    function = {"name": name, "arguments": {"key": "probe_argument"}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "probe0000", "function": function}],
    }


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}}
    return {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": parameters}}


def _attempt(template: Template, chat: Conversation) -> str | BadRow:
    try:
        return render_template(template, chat.messages, chat.tools)
    except BadRow as bad:
        return bad


def _header(template: Template, chat: Conversation) -> str:
    asked = chat.messages[:-1]
    try:
        bare, opened = render_template(template, asked), render_template(template, asked, header=True)
    except BadRow:
        return ""
    return opened[len(bare) :] if opened.startswith(bare) else ""


def _end(template: Template, tokens: re.Pattern[str], text: str, answer: Message) -> str:
    position = text.find(answer["content"])
    if position < 0:
        raise _unfit(template, "it leaves an answer out", hint="use another template")
    behind = text[position + len(answer["content"]) :]
    end = tokens.match(behind.lstrip())
    if end is None:
        found = repr(behind[:20]) if behind else "nothing"
        raise _unfit(
            template,
            f"no end-of-turn token follows an answer, but {found}",
            hint="the model would never learn to stop: write {{ eos_token }} behind the answer",
        )
    return end[0]


def _about(bad: BadRow) -> str:
    return bad.problem.replace("the chat template", "it", 1)


def _unfit(template: Template, reason: str, *, hint: str) -> LoraError:
    return LoraError(f"{template.name} cannot be trained with: {reason}", hint=hint)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    # Longest first, as tokenizers match; of no token, a pattern that matches nothing.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=lambda t: (-len(t), t))) or "(?!)")
