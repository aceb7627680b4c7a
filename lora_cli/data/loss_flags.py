"""Loss flags of turns and content parts (weight, train, loss, ...): which parts of an answer carry loss. No tokenizer.

Tools write such flags under many names, as booleans or as 0 and 1. Here they become one record for each turn:
`TurnLoss`.
A flag only takes loss away: it gives none to what data.loss_on does not select.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.readers import json_type, quote
from lora_cli.data.records import BadRow

# The name of a flag: whether its value true means loss.
LOSS_FLAGS: dict[str, bool] = {
    "weight": True,  # OpenAI, Mistral, Together
    "train": True,  # axolotl
    "training": True,
    "trainable": True,  # Tinker
    "loss": True,  # ms-swift, XTuner
    "loss_scale": True,
    "loss_weight": True,
    "loss_mask": True,  # 1 marks what carries loss
    "step_loss_mask": True,  # slime
    "masked": False,  # torchtune
}
# axolotl's ranges of the content: {begin_offset, end_offset (inclusive), train} each; the rest of it carries no loss.
RANGE_FLAGS = ("train_detail", "training_detail")

_SPELLINGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class Run(NamedTuple):
    """Consecutive characters of a turn's content that carry loss, or that do not."""

    length: int  # in characters
    loss: bool


class TurnLoss(NamedTuple):
    """Which parts of a turn carry loss."""

    before: bool  # what the template writes before the content, such as reasoning
    runs: tuple[Run, ...]  # the content, from its first to its last character; neighbors differ
    after: bool  # what the template writes behind the content: tool calls, and the end-of-turn token
    parts: int = 0  # parts of the content that flags take loss from

    @property
    def none(self) -> bool:
        """Whether no part of the turn carries loss."""
        return not (self.before or self.after or any(run.loss for run in self.runs))


class Flags(NamedTuple):
    """The loss flags of a message, as read."""

    turn: bool | None = None  # None: the turn has no flag of its own
    parts: tuple[Run, ...] = ()  # of the content, empty if no part has a flag
    asks: str | None = None  # the first flag that asks for loss: `messages[1].weight`


def read_flag(value: object, field: str) -> bool:
    """Return the value of a flag as a boolean.

    Raises:
        BadRow: it is neither a boolean, nor 0 or 1, nor the text of these.
    """
    if isinstance(value, str) and value.strip().lower() in _SPELLINGS:
        return _SPELLINGS[value.strip().lower()]
    if isinstance(value, bool | int | float):
        if value in (0, 1):
            return bool(value)
        problem = f"is {value:g}, but a token carries loss or does not: write 0 or 1"
        raise BadRow("loss flag is not 0 or 1", problem, field=field)
    found = quote(value) if isinstance(value, str) else json_type(value)
    raise BadRow("loss flag is not 0 or 1", f"is {found}, not 0, 1, true or false", field=field)


def flags_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that are loss flags."""
    return {name: value for name, value in message.items() if name in LOSS_FLAGS or name in RANGE_FLAGS}


def take_flags(message: dict[str, Any], location: str) -> Flags:
    """Remove the loss flags from `message` and from the parts of its content, and return them.

    Raises:
        BadRow: a flag has another value than 0 or 1, or two flags of the turn contradict each other.
    """
    turn, asks = _take_flag(message, location)
    parts: tuple[Run, ...] = ()
    if isinstance(content := message.get("content"), list):
        message["content"] = content = [dict(part) if isinstance(part, dict) else part for part in content]
        read = [
            _take_flag(part, f"{location}.content[{index}]") if isinstance(part, dict) else (None, None)
            for index, part in enumerate(content)
        ]
        if any(flag is not None for flag, _ in read):
            default = turn is not False
            parts = tuple(
                Run(_text_length(part), default if flag is None else flag)
                for part, (flag, _) in zip(content, read, strict=True)
            )
            asks = asks or next((name for _, name in read if name), None)
    for name in RANGE_FLAGS:
        if (ranges := message.pop(name, None)) is None:
            continue
        if parts:
            problem = "cannot be used together with loss flags of content parts: keep one"
            raise BadRow("conflicting loss flags", problem, field=f"{location}.{name}")
        parts = tuple(_runs_of_ranges(ranges, content, f"{location}.{name}"))
        asks = asks or (f"{location}.{name}" if any(run.loss for run in parts) else None)
    if turn is False and any(run.loss for run in parts):
        raise BadRow("conflicting loss flags", "the turn carries no loss, but a part of it does", field=location)
    return Flags(turn, parts, asks)


def turn_loss(flags: Flags, message: dict[str, Any], location: str) -> TurnLoss | None:
    """Return which parts of a message carry loss, None if its flags take none away.

    Args:
        flags: what `take_flags` returned for it.
        message: the message in its checked form, with the content as one text.
        location: of the message, for errors.

    Raises:
        BadRow: a flag asks for loss on a turn that is no answer, or the flagged parts are not the content.
    """
    if message["role"] != "assistant":
        if flags.asks:
            problem = f"a {message['role']} turn cannot carry loss, only an answer: remove the flag, or write 0"
            raise BadRow("loss flag of another turn than an answer", problem, field=flags.asks)
        flagged = flags.turn is False or flags.parts
        return TurnLoss(False, (Run(len(message["content"]), False),), False) if flagged else None
    turn = flags.turn is not False
    content = message["content"]
    runs = merge_runs(flags.parts or [Run(len(content), turn)])
    if sum(run.length for run in runs) != len(content):
        problem = "has loss flags on parts that are not text of the answer"
        raise BadRow("loss flag without text", problem, field=f"{location}.content")
    reasoning = any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    before = turn if reasoning or not runs else runs[0].loss
    after = turn if message.get("tool_calls") or not runs else runs[-1].loss
    if before and after and all(run.loss for run in runs):
        return None
    return TurnLoss(before, runs, after, sum(not run.loss and run.length > 0 for run in flags.parts))


def merge_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs without empty ones, and with neighbors of the same kind as one."""
    merged: list[Run] = []
    for run in runs:
        if not run.length:
            continue
        if merged and merged[-1].loss == run.loss:
            merged[-1] = Run(merged[-1].length + run.length, run.loss)
        else:
            merged.append(run)
    return tuple(merged)


def _take_flag(owner: dict[str, Any], location: str) -> tuple[bool | None, str | None]:
    """Remove the flags of a turn or part; return their value, and the name of one that asks for loss."""
    values: dict[str, bool] = {}
    for name in [name for name in owner if name in LOSS_FLAGS]:
        # Tables fill fields that a row does not have with nulls.
        if (value := owner.pop(name)) is not None:
            values[name] = read_flag(value, f"{location}.{name}") == LOSS_FLAGS[name]
    wanted = [name for name, loss in values.items() if loss]
    refused = [name for name, loss in values.items() if not loss]
    if wanted and refused:
        problem = f"{wanted[0]} asks for loss, and {refused[0]} for none"
        raise BadRow("conflicting loss flags", problem, field=location)
    if not values:
        return None, None
    return bool(wanted), f"{location}.{wanted[0]}" if wanted else None


def _text_length(part: object) -> int:
    text = part.get("text") if isinstance(part, dict) else None
    return len(text) if isinstance(text, str) else 0


def _runs_of_ranges(ranges: object, content: object, field: str) -> Iterator[Run]:
    """Yield the runs of a content that has axolotl's ranges: characters outside of them carry no loss."""
    if not isinstance(ranges, list) or not ranges or not isinstance(content, str):
        found = "is empty" if ranges == [] else f"is {json_type(ranges)}, not a list of ranges of a text"
        raise BadRow("wrong range of loss", found, field=field)
    marks: list[bool | None] = [None] * len(content)
    for index, item in enumerate(ranges):
        at = f"{field}[{index}]"
        begin, end = (item.get(name) if isinstance(item, dict) else None for name in ("begin_offset", "end_offset"))
        if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin <= end < len(content):
            problem = (
                f"is not a range within the {len(content)} characters of the turn: {{begin_offset, end_offset, train}}"
            )
            raise BadRow("wrong range of loss", problem, field=at)
        loss = read_flag(item.get("train"), f"{at}.train")
        if any(mark is not None and mark != loss for mark in marks[begin : end + 1]):
            raise BadRow("conflicting loss flags", "contradicts another range", field=at)
        marks[begin : end + 1] = [loss] * (end + 1 - begin)
    yield from merge_runs([Run(1, bool(mark)) for mark in marks])
