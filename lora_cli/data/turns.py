"""Arrange the turns of a conversation: cut it to its last answer, join turns of one role, check the order. No torch."""

from typing import NamedTuple

from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.loss_flags import Run, TurnLoss, merge_runs
from lora_cli.data.reasoning import CLOSE
from lora_cli.data.records import BadRow

# Roles that may follow each role; None is the start. A system message is only allowed first.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user", "assistant"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}

# Tool calls that some datasets write into the text of an answer, in the words of a model family.
CALLS_IN_TEXT = ("<tool_call>", "<functioncall>", "<function_call>", "<function=")
SINGLE_FIELDS = ("name", "reasoning_content", "reasoning", "thinking")  # that templates write once for a turn
SEPARATOR = "\n\n"  # between joined turns: a new paragraph
CUT_HINT = "fix them, or set data.on_bad_row: skip to cut them to their last answer, and count them"
JOIN_HINT = "fix them, or set data.merge_turns: true to join consecutive turns of one role, and count them"


class TurnOptions(NamedTuple):
    """How turns that are not in the usual order are handled."""

    join: bool = False  # data.merge_turns: join consecutive turns of one role; else such a row is bad
    cut_end: bool = False  # cut turns behind the last answer, as data.on_bad_row: skip does; else such a row is bad


class _Turn(NamedTuple):
    message: Message
    loss: TurnLoss | None
    position: int  # in the row


def arrange_turns(chat: Conversation, options: TurnOptions) -> Conversation:
    """Return the conversation with its turns joined and cut as `options` say, and check their order.

    Raises:
        BadRow: the order of roles is invalid, no answer is at the end, or no answer carries loss.
    """
    losses = chat.loss or (None,) * len(chat.messages)
    turns = [
        _Turn(message, loss, index) for index, (message, loss) in enumerate(zip(chat.messages, losses, strict=True))
    ]
    answers = [turn.position for turn in turns if turn.message["role"] == "assistant"]
    cut = bool(options.cut_end and answers and answers[-1] + 1 < len(turns))
    if cut:
        turns = turns[: answers[-1] + 1]
    joined = _join_turns(turns) if options.join else turns
    _check_order(joined, chat, joining=options.join)
    if joined[-1].message["role"] != "assistant":
        problem = f"ends with {joined[-1].message['role']}: there is no answer to learn from"
        reason, hint = ("no answer at the end", CUT_HINT) if answers else ("no answer", None)
        raise BadRow(reason, problem, field=chat.field, hint=hint)
    if all(turn.loss is not None and turn.loss.none for turn in joined if turn.message["role"] == "assistant"):
        problem = "has no answer that carries loss: the loss flags of its turns take all of it away"
        raise BadRow("nothing to learn", problem, field=chat.field)
    flagged = any(turn.loss is not None for turn in joined)
    return chat._replace(
        messages=[turn.message for turn in joined],
        loss=tuple(turn.loss for turn in joined) if flagged else (),
        joined=len(turns) - len(joined),
        cut=cut,
    )


def _check_order(turns: list[_Turn], chat: Conversation, *, joining: bool) -> None:
    previous: Message | None = None
    for message, _, position in turns:
        role, before = message["role"], previous["role"] if previous else None
        if role not in FOLLOWS[before]:
            problem = f"{role} cannot follow {before}"
            if before is None:
                problem = f"a conversation cannot start with {role}"
            elif role in {"system", "developer"}:
                problem = f"{role} must be the first message"
            elif role == before and joining:
                problem += ": data.merge_turns cannot join them, because their other fields do not fit one turn"
            reason, hint = "wrong role order", None
            if role == before and not joining:
                reason, hint = "two turns of one role", JOIN_HINT
            raise BadRow(reason, problem, field=f"{chat.location(position)}.role", hint=hint)
        if role == "tool" and before == "assistant" and previous is not None and not _calls_a_tool(previous):
            problem = "tool can only follow an assistant message with tool_calls"
            raise BadRow("wrong role order", problem, field=f"{chat.location(position)}.role")
        previous = message


def _calls_a_tool(answer: Message) -> bool:
    return "tool_calls" in answer or any(mark in answer["content"] for mark in CALLS_IN_TEXT)


def _join_turns(turns: list[_Turn]) -> list[_Turn]:
    """Join consecutive turns of one role; results of tools stay separate, because each answers a call of its own."""
    joined: list[_Turn] = []
    for turn in turns:
        merged = _join(joined[-1], turn) if joined and turn.message["role"] != "tool" else None
        if merged:
            joined[-1] = merged
        else:
            joined.append(turn)
    return joined


def _join(first: _Turn, second: _Turn) -> _Turn | None:
    """Return two turns as one; None if they have different roles, or fields that one turn cannot express."""
    one, other = first.message, second.message
    # Reasoning is only at the start of an answer.
    if one["role"] == "assistant" and CLOSE in other["content"]:
        return None
    calls = [*one.get("tool_calls", []), *other.get("tool_calls", [])]
    # One turn has its text before its calls, and each of the other fields once.
    if one["role"] != other["role"] or ("tool_calls" in one and other["content"]):
        return None
    if any(other.get(name, one.get(name)) != one.get(name) for name in SINGLE_FIELDS):
        return None
    separator = SEPARATOR if one["content"] and other["content"] else ""
    message = {**one, "content": one["content"] + separator + other["content"]}
    if calls:
        message["tool_calls"] = calls
    if first.loss is None and second.loss is None:
        return _Turn(message, None, first.position)
    before, after = first.loss or _full_loss(one), second.loss or _full_loss(other)
    if "tool_calls" in one and before.after != after.after:
        return None
    # The separator belongs to the text that it begins.
    runs = [*before.runs, Run(len(separator), after.runs[0].loss if after.runs else False), *after.runs]
    parts = before.parts + after.parts + sum(loss.none and not loss.parts for loss in (before, after))
    return _Turn(message, TurnLoss(before.before, merge_runs(runs), after.after, parts), first.position)


def _full_loss(message: Message) -> TurnLoss:
    return TurnLoss(True, merge_runs([Run(len(message["content"]), True)]), True)
