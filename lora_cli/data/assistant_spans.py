"""Find the assistant turns of a conversation rendered with a chat template, for the label mask. No tensors.

The span of a turn starts after the text that the server's generation prompt writes, and ends after its end-of-turn
token. A row whose spans are not certain is rejected. There are three ways to find spans, each tested on probe
conversations before the first row (`infer_template.py`):

blocks  the `{% generation %}` blocks of the template;
prefix  the rendering of the first messages is a prefix of the full rendering, and its length is the turn's border;
scan    for templates that write earlier turns differently from the last one: find each header. A header contains a
        control token, which no message may contain (such rows are rejected), so each one starts an assistant turn.
"""

import json
import re
from itertools import pairwise
from typing import Literal, NamedTuple

from lora_cli.data import reasoning
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.reasoning import Answer
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import Template, render_template, render_with_generation_blocks
from lora_cli.data.template_variables import is_reserved
from lora_cli.run.child_process import restart_time_limit

# Messages that are rendered to find the answers of a conversation by prefixes: of 4,000 turns, which takes a minute.
MAX_RENDERED = 8_000_000

# The form of reasoning that a template writes: both forms, a field, the start of the content, or none.
ReasoningForm = Literal["as is", "field", "inline", "omitted"]


class AssistantFormat(NamedTuple):
    """How a template writes assistant turns, inferred from probe conversations."""

    template: Template
    has_generation_blocks: bool  # the template contains {% generation %}
    header: str  # the start of an assistant turn; empty if a turn follows the user's text directly
    end_tokens: re.Pattern[str]  # end-of-turn tokens
    control_tokens: re.Pattern[str]  # tokens that structure a conversation, which no message may contain
    supports_tools: bool
    prompt_extra: str = ""  # written by the generation prompt after the header: `<think>\n`
    empty_blocks: tuple[str, ...] = ()  # the same, with other template variables: `<think>\n\n</think>\n\n`
    switches: tuple[str, ...] = ()  # template variables that change the generation prompt
    next_turn: str = ""  # the token of the next user turn, where it ends an answer, as in GLM-4
    tail: str = ""  # written once at the end of a complete conversation, after its last end-of-turn token
    reasoning: ReasoningForm = "as is"


class Span(NamedTuple):
    """A range from `start` up to, not including, `stop`: of characters in a text, or of tokens in a row."""

    start: int
    stop: int


class AnswerCounts(NamedTuple):
    """What the chat template did to the answers of a conversation, for the ledger."""

    rewritten: int = 0  # answers with changed text, reasoning not included
    dropped: int = 0  # earlier answers whose reasoning is omitted
    inserted: int = 0  # last answers whose reasoning the template omits, written after its generation prompt
    unprompted: int = 0  # answers that do not follow the text that the generation prompt writes
    empty: int = 0  # answers without reasoning after an empty block of it, which carries no loss
    reasoned: int = 0  # 1 if the last answer has reasoning
    answered: int = 0  # 1 if it has none


class RenderedChat(NamedTuple):
    """A rendered conversation with the spans of its assistant turns."""

    text: str
    turns: list[Span]  # in characters
    counts: AnswerCounts


def render_with_spans(format_: AssistantFormat, chat: Conversation) -> RenderedChat:
    """Render `chat` with one span per assistant turn, in order, not overlapping, each with its end-of-turn token.

    Raises:
        BadRow: the spans are not certain, or the template omits a part of the row.
    """
    if match := format_.control_tokens.search(_all_text(chat)):
        problem = f"contains the control token {match[0]}, which the model would read as the start or end of a turn"
        raise BadRow("control token in the text", problem)
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    *earlier, last = chat.messages
    messages = [_with_readable_reasoning(format_, message) for message in earlier]
    chat = chat._replace(messages=[*messages, _with_readable_reasoning(format_, last, last=True)])
    prompted = False  # whether the spans start after all of the generation prompt
    if format_.has_generation_blocks:
        text, blocks = render_with_generation_blocks(format_.template, chat.messages, chat.tools)
        spans = [_span_of_block(format_, text, start, stop) for start, stop in blocks]
    else:
        text = _render_complete(format_, chat, len(chat.messages))
        # Each answer takes renderings of all messages before it.
        spans = _spans_by_prefix(format_, chat, text) if len(answers) * len(chat.messages) <= MAX_RENDERED else []
        prompted = bool(spans)
        spans = spans or _spans_by_scan(format_, text)
    _check_questions(chat, text)
    _check_tool_results(format_, chat, text)
    if len(spans) != len(answers):
        problem = f"the chat template writes {len(spans)} answers for {len(answers)} assistant messages"
        raise BadRow("answers not found", problem)
    for before, after in pairwise(spans):
        if before.stop > after.start:
            raise BadRow("answers not found", "the answers overlap in the text that the chat template writes")
    return _finish(format_, text, spans, answers, prompted=prompted)


def _check_questions(chat: Conversation, text: str) -> None:
    """Raise a BadRow if the template omits the text of a message that is no answer."""
    position = 0  # where the last one was found: a search from the start for each message is slow in long conversations
    for message in chat.messages:
        if message["role"] not in {"system", "developer", "user"}:
            continue
        content = message["content"].strip()
        found = text.find(content, position)
        if found < 0 and content not in text:
            raise BadRow("text omitted by the chat template", f"the chat template omits the {message['role']} message")
        position = max(position, found)


def _check_tool_results(format_: AssistantFormat, chat: Conversation, text: str) -> None:
    """Raise a BadRow if the template omits the result of a tool."""
    for index, message in enumerate(chat.messages):
        content = message["content"].strip()
        # Some templates write it as JSON.
        if message["role"] != "tool" or content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
            continue
        # Others read its JSON and write it in their own form: then the text depends on it.
        changed = [*chat.messages[:index], {**message, "content": ""}, *chat.messages[index + 1 :]]
        try:
            omitted = render_template(format_.template, changed, chat.tools) == text.removesuffix(format_.next_turn)
        except BadRow:
            continue
        if omitted:
            raise BadRow("text omitted by the chat template", "the chat template omits the result of a tool")


def _all_text(chat: Conversation) -> str:
    parts = [message["content"] for message in chat.messages]
    # Tool calls, reasoning, names: other fields that a template may write.
    rest = [{k: v for k, v in m.items() if k not in {"role", "content"}} for m in chat.messages]
    return "\0".join([*parts, json.dumps([rest, chat.tools], ensure_ascii=False, default=str)])


def _with_readable_reasoning(format_: AssistantFormat, message: Message, *, last: bool = False) -> Message:
    if message["role"] != "assistant":
        return message
    match format_.reasoning:
        case "field":
            return reasoning.with_field(message)
        case "inline":
            return reasoning.with_inline(message)
        case "omitted" if last:  # `_insert_reasoning` writes it
            return {**message, "content": reasoning.split_reasoning(message).content}
        case _:
            return message


def _spans_by_prefix(format_: AssistantFormat, chat: Conversation, text: str) -> list[Span]:
    """Return the spans; empty if the rendering of the first messages is not a prefix of the full rendering."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        restart_time_limit()  # the number of answers is limited, see `MAX_RENDERED`
        last = index + 1 == len(chat.messages)
        try:
            head = render_template(format_.template, chat.messages[:index], chat.tools, generation_prompt=True)
            turn = text if last else _render_complete(format_, chat, index + 1)
        except BadRow:
            return []  # the template accepts complete conversations only
        turn = _without_tail(format_, turn)
        if not (text.startswith(head) and text.startswith(turn) and len(head) < len(turn)):
            return []
        # A turn can consist of several messages of the template, as in gpt-oss: its last end token ends it.
        ends = list(format_.end_tokens.finditer(text, len(head), len(turn)))
        if not ends or text[ends[-1].end() : len(turn)].strip():
            raise _no_end_token()
        spans.append(Span(len(head), ends[-1].end()))
    return spans


def _render_complete(format_: AssistantFormat, chat: Conversation, count: int) -> str:
    """Render the first `count` messages, with the token of the next turn where it ends the last answer."""
    text = render_template(format_.template, chat.messages[:count], chat.tools)
    return text + format_.next_turn


def _without_tail(format_: AssistantFormat, text: str) -> str:
    """Return a rendering without what the template writes once at its end: the server never generates after it."""
    body = text.rstrip()
    return body.removesuffix(format_.tail) if format_.tail and body.endswith(format_.tail) else text


def _spans_by_scan(format_: AssistantFormat, text: str) -> list[Span]:
    if not format_.control_tokens.search(format_.header):
        return []
    spans: list[Span] = []
    for match in re.finditer(re.escape(format_.header), text):
        end = format_.end_tokens.search(text, match.end())
        if end is None:
            raise _no_end_token()
        if spans and not text[spans[-1].stop : match.start()].strip():
            spans[-1] = Span(spans[-1].start, end.end())  # the same turn goes on in another message of the template
        else:
            spans.append(Span(match.end(), end.end()))
    return spans


def _span_of_block(format_: AssistantFormat, text: str, start: int, stop: int) -> Span:
    """Return the span of a block with its end-of-turn token, which can be after the block, and without its header."""
    end = format_.end_tokens.search(text, start)
    between = (text[end.end() : stop] or text[stop : end.start()]) if end else ""
    if end is None or between.strip():
        raise _no_end_token()
    return Span(start + len(format_.header) * text.startswith(format_.header, start), end.end())


def _no_end_token() -> BadRow:
    return BadRow("no end-of-turn token", "the chat template writes an answer without an end-of-turn token")


def _finish(
    format_: AssistantFormat, text: str, spans: list[Span], messages: list[Message], *, prompted: bool
) -> RenderedChat:
    """Move the start of each span after the text that the generation prompt writes, and prove each answer."""
    turns: list[Span] = []
    counts = AnswerCounts()
    for number, (message, (start, stop)) in enumerate(zip(messages, spans, strict=True)):
        last = number + 1 == len(messages)
        answer = reasoning.split_reasoning(message)
        has_reasoning = bool(answer.reasoning.strip())
        written = text[start:stop]
        _check_written(message, answer, written, text)
        counts = counts._replace(rewritten=counts.rewritten + (answer.content.strip() not in written))
        extra = format_.prompt_extra
        follows_prompt = prompted or written.startswith(extra) or text.endswith(extra, 0, start)
        if not prompted and written.startswith(extra):
            start += len(extra)
        if has_reasoning and answer.reasoning.strip() not in written:
            if not last:
                counts = counts._replace(dropped=counts.dropped + 1)
                if empty := _empty_block_at(format_, text, start):  # in place of it, as in DeepSeek V3.1
                    start, follows_prompt = start + len(empty), True
            else:
                text, start, stop = _insert_reasoning(format_, text, Span(start, stop), answer.reasoning)
                counts, follows_prompt = counts._replace(inserted=1), True
        elif has_reasoning and (
            # The header contains the block where the template writes it before every answer, as in SmolLM3.
            reasoning.EMPTY_BLOCK.fullmatch(extra) or format_.header.rstrip().endswith(reasoning.CLOSE)
        ):
            raise _reasoning_omitted(format_, "the generation prompt ends the reasoning before the answer")
        elif not has_reasoning and (empty := _empty_block_at(format_, text, start)):
            start += len(empty)
            follows_prompt = True
            counts = counts._replace(empty=counts.empty + 1)
        counts = counts._replace(unprompted=counts.unprompted + (not follows_prompt))
        if last:
            counts = counts._replace(reasoned=int(has_reasoning), answered=int(not has_reasoning))
        turns.append(Span(start, stop))
    return RenderedChat(text, turns, counts)


def _empty_block_at(format_: AssistantFormat, text: str, start: int) -> str:
    """Return the empty block of reasoning at `start` that a server's prompt writes if thinking is off; "" if none."""
    return next((block for block in format_.empty_blocks if text.startswith(block, start)), "")


def _insert_reasoning(format_: AssistantFormat, text: str, span: Span, thoughts: str) -> tuple[str, int, int]:
    """Write the reasoning that the template omits after the last answer's generation prompt, which opens its block.

    Returns the text with the start and stop of the answer.
    """
    opening = reasoning.OPEN_BLOCK.fullmatch(format_.prompt_extra)
    if opening is None:
        raise _reasoning_omitted(format_, "the chat template omits the reasoning of the last answer")
    before, answer, after = text[: span.start], text[span.start : span.stop], text[span.stop :]
    before = before if before.endswith(format_.prompt_extra) else before + format_.prompt_extra
    close = f"</{opening['tag']}>"
    # The line breaks around the closing tag are those of the models that write such blocks.
    end = "" if answer.startswith(close) else f"\n{close}\n\n" if "\n" in format_.prompt_extra else close
    answer = thoughts.strip("\n") + end + (answer.lstrip("\n") if "\n" in end else answer)
    return before + answer + after, len(before), len(before) + len(answer)


def _reasoning_omitted(format_: AssistantFormat, problem: str) -> BadRow:
    names = ", ".join(format_.switches or [name for name in format_.template.variables if not is_reserved(name)])
    fix = "use a chat template that writes it"
    if names:
        fix = f"change data.template_variables, or the row's chat_template_kwargs ({names})"
    return BadRow(
        "reasoning omitted by the chat template", f"has reasoning, but {problem}: {fix}, or remove the reasoning"
    )


def _check_written(message: Message, answer: Answer, written: str, text: str) -> None:
    for call in message.get("tool_calls", []):
        if call["function"]["name"] not in written:
            raise BadRow("text omitted by the chat template", "the chat template omits the assistant's tool_calls")
    content = answer.content.strip()
    if content not in written and content in text:
        raise BadRow("answers not found", "an answer is not in its assistant turn")
