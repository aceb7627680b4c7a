"""What a chat template puts around the contents of messages, found by rendering chats of known contents.

Nothing is read of the template's own language: only what it makes of system, user and assistant messages counts. Tools
and reasoning are left out, and so are contents that a template looks into, as Qwen 3's does for `</think>`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.export.probe_chats import Messages, render_prompt

USE_GGUF_HINT = "use --to gguf: llama.cpp and LM Studio run the tokenizer's own template, Ollama cannot"

NO_TRIM = "nothing"

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_MARK = "zq{}zq"
_BLANKS = " \n \n"
# What is taken off a content, by the words for it; the first that explains what is seen.
_TRIMS: Mapping[str, Callable[[str], str]] = {
    NO_TRIM: str,
    "white space at both ends": str.strip,
    "white space at the start": str.lstrip,
    "white space at the end": str.rstrip,
    "line ends at both ends": lambda text: text.strip("\n"),
    "line ends at the start": lambda text: text.lstrip("\n"),
    "line ends at the end": lambda text: text.rstrip("\n"),
}


class SystemMessage(NamedTuple):
    """Where the first message is a system message."""

    before: str
    after: str
    joins: bool  # the user turn that follows has begun with it, as Gemma 3 and Llama 2 have it
    late: bool  # it stands in the last user turn, behind what begins that, as newer Mistrals have it
    hides: bool  # one without content is as none, and not what is around contents alone
    default: str  # the content that is put in where there is none; "" where that is not so


class TemplateParts(NamedTuple):
    """A prompt is `added`, `start`, `opening` or a system message, turns, and `generation`."""

    added: str  # BOS, where the runtime puts it in front of every prompt
    start: str  # BOS, where that begins every prompt and the runtime does not add it
    opening: str  # where no system message is shown
    opens: bool  # the first user turn has begun with that, and is not what others are
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str
    generation: str
    stop: str  # what ends an answer: a token, or text
    system: SystemMessage | None  # None: the template refuses system messages, or leaves them out
    trims: Mapping[str, str]  # by role, what is taken off contents; see `trimmed`

    def trimmed(self, chat: Messages) -> list[dict[str, str]]:
        """The chat as the template takes it."""
        return [
            {"role": message["role"], "content": _TRIMS[self.trims.get(message["role"], NO_TRIM)](message["content"])}
            for message in chat
        ]


class _Split(NamedTuple):
    order: list[int]  # the messages in the order in which their contents stand
    gaps: list[str]  # before, between and behind them


def infer_template(tokenizer: PreTrainedTokenizerBase, *, added: str) -> TemplateParts:
    """What the chat template of `tokenizer` puts around contents.

    Args:
        tokenizer: one that has a chat template.
        added: the text of the token that the runtime puts in front of a prompt on its own, else "".

    Raises:
        LoraError: what is around contents depends on more than can be told.
    """
    cut = partial(_split_at_markers, tokenizer)
    long, short = cut("uauau"), cut("u")
    if long is None or short is None:
        raise LoraError(
            "--to ollama: the chat template refuses chats of user and assistant by turns", hint=USE_GGUF_HINT
        )
    _expect_order(long.order, range(5))
    opening, answer, question, *_ = long.gaps
    last = long.gaps[-1]
    _expect("questions and answers", long.gaps, [opening, answer, question, answer, question, last])
    _expect("a single question", short.gaps, [opening, last])

    units = partial(_common_prefix, _token_pattern(tokenizer))
    unprompted, finished = cut("u", prompt=False), cut("ua", prompt=False)
    end = finished.gaps[-1] if finished else question
    after_user = units([answer, last, *([unprompted.gaps[-1]] if unprompted else [])])
    after_assistant = units([question, end])
    before_user = question.removeprefix(after_assistant)
    before_assistant = answer.removeprefix(after_user)

    system = _system(tokenizer, long.gaps, before_user=before_user)
    front = system is not None and not system.late
    beginnings = [opening, *([system.before] if system and front else [])]
    if not all(text.startswith(added) for text in beginnings):
        raise LoraError(
            f"--to ollama: Ollama puts {added} in front of every prompt, as the tokenizer does with plain text, and the"
            f" chat template begins with {beginnings[0][:40]!r}",
            hint="let the template begin with {{ bos_token }}, or the tokenizer add none: as it was trained",
        )
    start = added
    if system and front and not added and (inner := cut("uasu")):
        # BOS may begin the chat, or each of its messages: one further on tells.
        bos, between = str(tokenizer.bos_token or ""), inner.gaps[2].removeprefix(after_assistant)
        start = bos if opening.startswith(bos) and system.before == bos + between else ""
    if system and front:
        system = system._replace(before=system.before.removeprefix(start))
    opening = opening.removeprefix(start)
    opens = not opening.endswith(before_user)
    return TemplateParts(
        added=added,
        start="" if added else start,
        opening=opening if opens else opening.removesuffix(before_user),
        opens=opens,
        before_user=before_user,
        after_user=after_user,
        before_assistant=before_assistant,
        after_assistant=after_assistant,
        generation=last.removeprefix(after_user),
        stop=_stop(_token_pattern(tokenizer), end),
        system=system,
        trims={_ROLES[role]: _find_trim(tokenizer, role, shown=system is not None) for role in _ROLES},
    )


def marker_chat(roles: str) -> list[dict[str, str]]:
    """A chat of messages by these roles, named by their first letters, each of a content that is in no template."""
    return [{"role": _ROLES[role], "content": _MARK.format(number)} for number, role in enumerate(roles)]


def _system(tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], *, before_user: str) -> SystemMessage | None:
    """What a system message in front makes of a chat, with BOS where that is in front of it."""
    long, short = _split_at_markers(tokenizer, "suauau"), _split_at_markers(tokenizer, "su")
    if long is None or short is None:
        return None
    opening, *between, last = plain
    hides = _render(tokenizer, ["system", "user"], ["", "a"]) == _render(tokenizer, ["user"], ["a"])
    match long.order:
        case [1, 2, 3, 4, 5]:
            _expect("a system message", long.gaps, plain)
            return None
        case [1, 2, 3, 4, 0, 5]:
            after = long.gaps[5]
            _expect("a system message", long.gaps, [*plain[:-1], after, last])
            _expect("a system message and a question", short.gaps, [opening, after, last])
            return SystemMessage("", after, joins=False, late=True, hides=hides, default="")
        case _:
            _expect_order(long.order, range(6))
            before, after = long.gaps[:2]
            _expect("a system message", long.gaps, [before, after, *between, last])
            _expect("a system message and a question", short.gaps, [before, after, last])
    default = ""
    if opening.startswith(before) and opening.endswith(after) and len(opening) > len(before) + len(after):
        default = opening[len(before) : len(opening) - len(after)]
    if _render(tokenizer, ["system", "user"], [default, "a"]) != _render(tokenizer, ["user"], ["a"]):
        default = ""
    hides = hides and opening != before + after
    joins = not after.endswith(before_user)
    after = after if joins else after.removesuffix(before_user)
    return SystemMessage(before, after, joins=joins, late=False, hides=hides, default=default)


def _render(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], contents: Sequence[str]) -> str | None:
    return render_prompt(
        tokenizer, [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    )


def _split_at_markers(tokenizer: PreTrainedTokenizerBase, roles: str, *, prompt: bool = True) -> _Split | None:
    """What is around the contents of messages of these roles; None where the template refuses them."""
    try:
        text = str(tokenizer.apply_chat_template(marker_chat(roles), tokenize=False, add_generation_prompt=prompt))
    except TemplateError:
        return None
    parts = re.split(_MARK.format(r"(\d)"), text)
    return _Split([int(number) for number in parts[1::2]], parts[::2])


def _expect_order(order: Sequence[int], expected: Iterable[int]) -> None:
    if list(order) != list(expected):
        raise LoraError(
            "--to ollama: the chat template leaves messages out, repeats or changes them: of contents"
            f" {', '.join(map(str, expected))} it writes {', '.join(map(str, order)) or 'none'}",
            hint=USE_GGUF_HINT,
        )


def _expect(what: str, found: Sequence[str], expected: Sequence[str]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            raise LoraError(
                f"--to ollama: with {what} the chat template writes {one!r} before content {number}, and {other!r} in"
                " the like place elsewhere",
                hint=USE_GGUF_HINT,
            )


def _find_trim(tokenizer: PreTrainedTokenizerBase, role: str, *, shown: bool) -> str:
    """What the template takes off contents of `role`; NOTHING too where none of the known explains it."""
    roles = {"s": "su", "u": "u", "a": "uau"}[role]
    if role == "s" and not shown:
        return NO_TRIM
    names, at = [_ROLES[letter] for letter in roles], roles.index(role)
    contents = [_MARK.format(number) for number in range(len(roles))]
    padded = _BLANKS + contents[at] + _BLANKS
    plain = _render(tokenizer, names, contents)
    found = _render(tokenizer, names, [*contents[:at], padded, *contents[at + 1 :]])
    assert plain is not None
    return next((name for name, trim in _TRIMS.items() if plain.replace(contents[at], trim(padded)) == found), NO_TRIM)


def _token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Text is cut between characters, but not inside of added tokens."""
    added = sorted((entry.content for entry in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, added), "."]), re.DOTALL)


def _stop(units: re.Pattern[str], end: str) -> str:
    """The first token in what stands behind an answer, which a line end or the end of the chat may follow; else all."""
    return next((unit for unit in units.findall(end) if len(unit) > 1 and unit.strip()), end.strip())


def _common_prefix(units: re.Pattern[str], texts: Sequence[str]) -> str:
    """What all begin with."""
    columns = zip(*(units.findall(text) for text in texts), strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
