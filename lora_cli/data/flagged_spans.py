"""Find the text of a rendered conversation that loss flags take loss from, as spans of characters. No tensors."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_cli.data.assistant_spans import Span
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.loss_flags import Run, TurnLoss
from lora_cli.data.records import BadRow
from lora_cli.data.segments import Segments


def spans_without_loss(
    chat: Conversation, text: str, answers: Sequence[Span], end_tokens: re.Pattern[str]
) -> list[Span]:
    """Return the spans within the answers that flags take loss from: in order, not overlapping, not empty.

    Args:
        chat: the conversation.
        text: its rendering with the chat template.
        answers: the span of each of its answers in `text`, end-of-turn token included.
        end_tokens: the end-of-turn tokens.

    Raises:
        BadRow: the template writes an answer so that the text of its flagged parts is not certain.
    """
    if not chat.loss:
        return []
    turns = zip(chat.messages, chat.loss, strict=True)
    flagged = [(message, loss) for message, loss in turns if message["role"] == "assistant"]
    return [
        part
        for (message, loss), span in zip(flagged, answers, strict=True)
        if loss is not None
        for part in _in_answer(message, loss, text, span, end_tokens)
    ]


def spans_of_segments(row: Segments) -> list[Span]:
    """Return the spans of a row's text that carry loss, in characters."""
    ends = np.cumsum([run.length for run in row.runs]).tolist()
    return [Span(end - run.length, end) for run, end in zip(row.runs, ends, strict=True) if run.loss]


def check_flags_of_answers_only(chat: Conversation) -> None:
    """Check a row for data.loss_on: all, where the text of other turns carries loss too.

    Raises:
        BadRow: a flag takes loss from a turn that is no answer, and whose text is therefore not known exactly.
    """
    turns = zip(chat.messages, chat.loss or (), strict=False)
    for index, (message, loss) in enumerate(turns):
        if loss is not None and message["role"] != "assistant":
            problem = (
                f"has a loss flag on a {message['role']} turn, but data.loss_on: all learns all but flagged answers"
            )
            raise BadRow("loss flag of another turn than an answer", problem, field=chat.location(index))


def subtract_spans(spans: Sequence[Span], without: Sequence[Span]) -> list[Span]:
    """Return the parts of `spans` outside of `without`; both are in order and do not overlap."""
    rest = []
    for start, stop in spans:
        for gap in without:
            if start < gap.stop and gap.start < stop:
                if start < gap.start:
                    rest.append(Span(start, gap.start))
                start = gap.stop
        if start < stop:
            rest.append(Span(start, stop))
    return rest


def _in_answer(message: Message, loss: TurnLoss, text: str, span: Span, end_tokens: re.Pattern[str]) -> list[Span]:
    if loss.none:
        return [span]
    turn = text[span.start : span.stop]
    ends = list(end_tokens.finditer(turn))
    body = turn[: ends[-1].start()] if ends else turn  # without the end-of-turn token
    runs = [Run(0, loss.before), *_placed(message, loss, body)]
    written = sum(run.length for run in runs)
    runs.append(Run(len(turn) - written, loss.after))
    parts: list[Span] = []
    start = span.start
    for length, carries in runs:
        if length and not carries:
            begin = parts.pop().start if parts and parts[-1].stop == start else start
            parts.append(Span(begin, start + length))
        start += length
    return parts


def _placed(message: Message, loss: TurnLoss, body: str) -> list[Run]:
    """Return the runs of an answer as `body` has them, and before them a run with what precedes the content.

    Templates remove white space around the content, and some rewrite or omit the reasoning at its start. What they
    write instead of the first run is taken for that run.
    """
    content: str = message["content"]
    if not content.strip():
        return []
    if at := _find(content, message, body):
        return [Run(at.start, loss.before), *_clip(loss.runs, at)]
    first, *rest = loss.runs
    tail = content[first.length :]
    at = _find(tail, message, body) if tail.strip() and "tool_calls" not in message else None
    if at is None or loss.before != first.loss:
        problem = "has loss flags on parts of an answer that the chat template writes differently"
        raise BadRow("loss flag without text", problem)
    return [Run(at.start, first.loss), *_clip(rest, at)]


class _Place(NamedTuple):
    """Where a text is in a rendered answer."""

    start: int  # in characters of the answer
    skipped: int  # white space at the start of the text that is not written
    length: int  # of the text as it is written


def _find(content: str, message: Message, body: str) -> _Place | None:
    """Return the place of the content: at the end of `body`, or before its tool calls; None if that is not certain."""
    stripped = content.strip()
    skipped = content.index(stripped)
    if "tool_calls" not in message:
        if body.endswith(content):
            return _Place(len(body) - len(content), 0, len(content))
        written = body.rstrip()
        for text, left_out in ((content.rstrip(), 0), (stripped, skipped)):
            if written.endswith(text):
                return _Place(len(written) - len(text), left_out, len(text))
        return None
    if body.startswith(content):
        return _Place(0, 0, len(content))
    if body.count(stripped) != 1:
        return None
    start = body.index(stripped)
    # Where a template omits the text of calls, their arguments may contain the same text.
    before_calls = body.find(message["tool_calls"][0]["function"]["name"], start + len(stripped)) >= 0
    return _Place(start, skipped, len(stripped)) if before_calls else None


def _clip(runs: Sequence[Run], place: _Place) -> list[Run]:
    """Return the runs without the white space at both ends that the template does not write."""
    clipped = []
    start, stop = 0, place.skipped + place.length
    for length, loss in runs:
        inside = min(start + length, stop) - max(start, place.skipped)
        clipped.append(Run(max(0, inside), loss))
        start += length
    return clipped
