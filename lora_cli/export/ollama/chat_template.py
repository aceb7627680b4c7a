"""Infer the text that a chat template puts around the contents of messages, by rendering chats with known contents.

The template's Jinja source is not parsed: only its output for system, user and assistant messages counts. Tools and
reasoning are not covered, nor are contents that a template inspects (Qwen 3's searches for `</think>`).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.export.probe_chats import Messages, render_prompt

USE_GGUF_HINT = "use --to gguf: llama.cpp and LM Studio run the tokenizer's own template, Ollama cannot"

NO_TRIM = "nothing"

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_MARKER = "zq{}zq"  # with the number of the message; in no template
_WHITESPACE = " \n \n"
# Ways to trim a content, by description. The first that explains the output is chosen.
_TRIMS: Mapping[str, Callable[[str], str]] = {
    NO_TRIM: str,
    "whitespace at both ends": str.strip,
    "whitespace at the start": str.lstrip,
    "whitespace at the end": str.rstrip,
    "newlines at both ends": lambda text: text.strip("\n"),
    "newlines at the start": lambda text: text.lstrip("\n"),
    "newlines at the end": lambda text: text.rstrip("\n"),
}


class SystemMessage(NamedTuple):
    """How the template renders a system message at the beginning of a chat."""

    before: str
    after: str
    joins_user: bool  # `after` begins the user turn that follows, as in Gemma 3 and Llama 2
    in_last_user: bool  # the message is part of the last user turn, after its beginning, as in newer Mistral models
    skips_empty: bool  # an empty message renders like no message, without `before` and `after`
    default: str  # content that the template inserts if a chat has no system message; "" if it inserts none


class TemplateParts(NamedTuple):
    """The texts of a prompt: `runtime_bos`, `bos`, `opening` or a system message, turns, and `generation_prompt`."""

    runtime_bos: str  # BOS, if the runtime adds it to every prompt
    bos: str  # BOS, if it begins every prompt and the runtime does not add it
    opening: str  # text before the first turn, if no system message is rendered
    opening_joins_user: bool  # `opening` begins the first user turn, which differs from later ones
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str
    generation_prompt: str
    stop: str  # ends an answer: the text of a token, or plain text
    system: SystemMessage | None  # None: the template rejects system messages, or omits them
    trims: Mapping[str, str]  # by role, the whitespace that the template trims from contents (a key of `_TRIMS`)

    def trimmed(self, chat: Messages) -> list[dict[str, str]]:
        """Return the chat with contents trimmed as the template trims them."""
        return [
            {"role": message["role"], "content": _TRIMS[self.trims.get(message["role"], NO_TRIM)](message["content"])}
            for message in chat
        ]


class _Split(NamedTuple):
    """A rendered chat, split at the contents of its messages."""

    order: list[int]  # numbers of the messages, in the order of their contents in the text
    gaps: list[str]  # text before, between and after the contents


def infer_template(tokenizer: PreTrainedTokenizerBase, *, runtime_bos: str) -> TemplateParts:
    """Return the texts that the chat template of `tokenizer` puts around contents.

    Args:
        tokenizer: a tokenizer that has a chat template.
        runtime_bos: the text of the token that the runtime itself adds to the beginning of a prompt, else "".

    Raises:
        LoraError: the text around contents cannot be inferred, since it depends on more than the roles.
    """
    split = partial(_split_at_contents, tokenizer)
    long, short = split("uauau"), split("u")
    if long is None or short is None:
        raise LoraError(
            "--to ollama: the chat template refuses chats that alternate user and assistant", hint=USE_GGUF_HINT
        )
    _check_order(long.order, range(5))
    opening, to_assistant, to_user, *_ = long.gaps
    last = long.gaps[-1]
    _check_gaps("several turns", long.gaps, [opening, to_assistant, to_user, to_assistant, to_user, last])
    _check_gaps("a single user message", short.gaps, [opening, last])

    common_prefix = partial(_common_prefix, _text_units(tokenizer))
    unprompted, answered = split("u", prompt=False), split("ua", prompt=False)
    end = answered.gaps[-1] if answered else to_user
    after_user = common_prefix([to_assistant, last, *([unprompted.gaps[-1]] if unprompted else [])])
    after_assistant = common_prefix([to_user, end])
    before_user = to_user.removeprefix(after_assistant)
    before_assistant = to_assistant.removeprefix(after_user)

    system = _infer_system(tokenizer, long.gaps, before_user=before_user)
    system_first = system is not None and not system.in_last_user
    beginnings = [opening, *([system.before] if system and system_first else [])]
    if not all(text.startswith(runtime_bos) for text in beginnings):
        raise LoraError(
            f"--to ollama: Ollama adds {runtime_bos} in front of every prompt, as the tokenizer does for plain text, "
            f"but the chat template begins with {beginnings[0][:40]!r}",
            hint="begin the template with {{ bos_token }}, or let the tokenizer add no BOS: as in training",
        )
    bos = runtime_bos
    if system and system_first and not runtime_bos and (later_system := split("uasu")):
        # BOS can begin the chat, or each of its messages: a later system message shows which.
        token, between = str(tokenizer.bos_token or ""), later_system.gaps[2].removeprefix(after_assistant)
        bos = token if opening.startswith(token) and system.before == token + between else ""
    if system and system_first:
        system = system._replace(before=system.before.removeprefix(bos))
    opening = opening.removeprefix(bos)
    opening_joins_user = not opening.endswith(before_user)
    return TemplateParts(
        runtime_bos=runtime_bos,
        bos="" if runtime_bos else bos,
        opening=opening if opening_joins_user else opening.removesuffix(before_user),
        opening_joins_user=opening_joins_user,
        before_user=before_user,
        after_user=after_user,
        before_assistant=before_assistant,
        after_assistant=after_assistant,
        generation_prompt=last.removeprefix(after_user),
        stop=_stop_text(_text_units(tokenizer), end),
        system=system,
        trims={_ROLES[role]: _find_trim(tokenizer, role, shown=system is not None) for role in _ROLES},
    )


def marker_chat(roles: str) -> list[dict[str, str]]:
    """Return a chat with these roles, named by their first letters; each content is a marker that is in no template."""
    return [{"role": _ROLES[role], "content": _MARKER.format(number)} for number, role in enumerate(roles)]


def _infer_system(
    tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], *, before_user: str
) -> SystemMessage | None:
    """Return how a system message at the beginning is rendered, with BOS in `before` if BOS precedes it.

    Args:
        tokenizer: a tokenizer that has a chat template.
        plain: the gaps of the chat "uauau", which has no system message.
        before_user: the text before a user content.

    Returns:
        None if the template rejects system messages, or omits them.
    """
    long, short = _split_at_contents(tokenizer, "suauau"), _split_at_contents(tokenizer, "su")
    if long is None or short is None:
        return None
    opening, *between, last = plain
    skips_empty = _render(tokenizer, ["system", "user"], ["", "a"]) == _render(tokenizer, ["user"], ["a"])
    match long.order:
        case [1, 2, 3, 4, 5]:
            _check_gaps("a system message", long.gaps, plain)
            return None
        case [1, 2, 3, 4, 0, 5]:
            after = long.gaps[5]
            _check_gaps("a system message", long.gaps, [*plain[:-1], after, last])
            _check_gaps("a system and a user message", short.gaps, [opening, after, last])
            return SystemMessage("", after, joins_user=False, in_last_user=True, skips_empty=skips_empty, default="")
        case _:
            _check_order(long.order, range(6))
            before, after = long.gaps[:2]
            _check_gaps("a system message", long.gaps, [before, after, *between, last])
            _check_gaps("a system and a user message", short.gaps, [before, after, last])
    default = ""
    if opening.startswith(before) and opening.endswith(after) and len(opening) > len(before) + len(after):
        default = opening[len(before) : len(opening) - len(after)]
    if _render(tokenizer, ["system", "user"], [default, "a"]) != _render(tokenizer, ["user"], ["a"]):
        default = ""
    skips_empty = skips_empty and opening != before + after
    joins_user = not after.endswith(before_user)
    after = after if joins_user else after.removesuffix(before_user)
    return SystemMessage(
        before, after, joins_user=joins_user, in_last_user=False, skips_empty=skips_empty, default=default
    )


def _render(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], contents: Sequence[str]) -> str | None:
    """Return the prompt of messages with these roles and contents, None if the template rejects them."""
    return render_prompt(
        tokenizer, [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    )


def _split_at_contents(tokenizer: PreTrainedTokenizerBase, roles: str, *, prompt: bool = True) -> _Split | None:
    """Render a chat with these roles and split it at the contents; None if the template rejects it."""
    text = render_prompt(tokenizer, marker_chat(roles), generation_prompt=prompt)
    if text is None:
        return None
    parts = re.split(_MARKER.format(r"(\d)"), text)
    return _Split([int(number) for number in parts[1::2]], parts[::2])


def _check_order(order: Sequence[int], expected: Iterable[int]) -> None:
    """Raise a LoraError unless the template writes each content once, in the order of the messages."""
    if list(order) != list(expected):
        raise LoraError(
            "--to ollama: the chat template leaves messages out, repeats or changes them: it writes contents "
            f"{', '.join(map(str, order)) or 'none'} instead of {', '.join(map(str, expected))}",
            hint=USE_GGUF_HINT,
        )


def _check_gaps(chat: str, gaps: Sequence[str], expected: Sequence[str]) -> None:
    """Raise a LoraError unless the template writes the expected texts around the contents of `chat` (a description)."""
    for number, (gap, other) in enumerate(zip(gaps, expected, strict=True)):
        if gap != other:
            raise LoraError(
                f"--to ollama: with {chat}, the chat template writes {gap!r} before content {number}, but {other!r} in "
                "the same position elsewhere",
                hint=USE_GGUF_HINT,
            )


def _find_trim(tokenizer: PreTrainedTokenizerBase, role: str, *, shown: bool) -> str:
    """Return the key of `_TRIMS` that explains how contents of `role` are trimmed, `NO_TRIM` if none does."""
    roles = {"s": "su", "u": "u", "a": "uau"}[role]
    if role == "s" and not shown:
        return NO_TRIM
    names, at = [_ROLES[letter] for letter in roles], roles.index(role)
    contents = [_MARKER.format(number) for number in range(len(roles))]
    padded = _WHITESPACE + contents[at] + _WHITESPACE
    plain = _render(tokenizer, names, contents)
    text = _render(tokenizer, names, [*contents[:at], padded, *contents[at + 1 :]])
    assert plain is not None
    return next((name for name, trim in _TRIMS.items() if plain.replace(contents[at], trim(padded)) == text), NO_TRIM)


def _text_units(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches one added token or one character: an added token must not be split."""
    added = sorted((entry.content for entry in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, added), "."]), re.DOTALL)


def _stop_text(units: re.Pattern[str], end: str) -> str:
    """Return the first token in `end`, the text after an answer; all of `end` if it contains no token."""
    return next((unit for unit in units.findall(end) if len(unit) > 1 and unit.strip()), end.strip())


def _common_prefix(units: re.Pattern[str], texts: Sequence[str]) -> str:
    """Return the longest common prefix of `texts` in whole `units`."""
    columns = zip(*(units.findall(text) for text in texts), strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
