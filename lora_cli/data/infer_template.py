"""Infer how a chat template writes assistant turns, and test it on probe conversations before the first row."""

import re
from itertools import takewhile
from typing import Any

from lora_cli.data import reasoning
from lora_cli.data.assistant_spans import AssistantFormat, ReasoningForm, render_with_spans
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import Template, render_template
from lora_cli.data.template_variables import template_names
from lora_cli.errors import LoraError

THOUGHT = "probe thought text"


def infer_template_format(
    template: Template, *, special: set[str], added: set[str], bos: str | None
) -> AssistantFormat:
    """Infer how a template writes assistant turns, and test the result on probe conversations.

    Args:
        template: the chat template.
        special: texts of the tokenizer's special tokens.
        added: texts of its added tokens that are not special, but written as tags.
        bos: text of its BOS token, if it has one.

    Raises:
        LoraError: labels would not be exact with this template.
    """
    # A template may write end-of-turn tokens of a conversation, but tags of reasoning are no borders of turns.
    special = special - {reasoning.OPEN, reasoning.CLOSE}
    tokens = _any_of(special)
    tools = [_tool("probe_tool")]
    probes = _probes()
    texts = [_try_render(template, chat) for chat in probes]
    rendered = [(chat, text) for chat, text in zip(probes, texts, strict=True) if isinstance(text, str)]
    if not rendered:
        errors = [_problem(text) for text in texts if isinstance(text, BadRow)]
        raise _unusable(template, errors[0], hint="use another template, or fix this one")
    next_turn = _next_turn_token(rendered, tokens)
    rendered = [(chat, text + next_turn) for chat, text in rendered]
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
    tail = _infer_tail(rendered, _any_of(ends))
    header, extra = _infer_header(template, *rendered[-1], tokens=tokens, tail=tail)
    switched = _switched_prompts(template, rendered[0][0], header=header, extra=extra, tail=tail)
    format_ = AssistantFormat(
        template=template,
        has_generation_blocks=re.search(r"{%-?\s*generation\s*-?%}", template.source) is not None,
        header=header,
        end_tokens=_any_of(ends),
        control_tokens=_any_of(
            {token for token in special if token in template.source}
            | {token for token in added if token in header}
            | ends
            | ({bos} if bos else set())
        ),
        supports_tools=isinstance(with_tools, str) and "probe_tool" in with_tools,
        prompt_extra=extra,
        empty_blocks=tuple(sorted(filter(reasoning.EMPTY_BLOCK.fullmatch, switched.values()), key=len, reverse=True)),
        switches=tuple(sorted({name for name, _ in switched})),
        next_turn=next_turn,
        tail=tail,
        reasoning=_reasoning_form(template),
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


def _next_turn_token(rendered: list[tuple[Conversation, str]], tokens: re.Pattern[str]) -> str:
    """Return the token that starts a user turn, if it ends an answer too and nothing follows the last answer.

    Models with such a template, as GLM-4, generate this token to stop. "" for other templates.
    """
    for chat, text in rendered:
        contents = [message["content"] for message in chat.messages]
        if chat.messages[0]["role"] != "user" or len(contents) == 2 or not text.rstrip().endswith(contents[-1]):
            continue
        question, answer = contents[:2]
        end = tokens.match(text[text.find(answer) + len(answer) :].lstrip())
        before, between = text[: text.find(question)], text[text.find(question) : text.find(answer)]
        # A token that starts assistant turns too cannot end one.
        if end and end[0] in before and end[0] not in between:
            return end[0]
    return ""


def _infer_tail(rendered: list[tuple[Conversation, str]], ends: re.Pattern[str]) -> str:
    """Return what the template writes once after the last end-of-turn token of each probe; "" if they differ."""
    tails = set()
    for chat, text in rendered:
        end = ends.search(text, text.rindex(chat.messages[-1]["content"]))
        tails.add(text[end.end() :].strip() if end else "")
    return tails.pop() if len(tails) == 1 else ""


def _infer_header(
    template: Template, chat: Conversation, text: str, *, tokens: re.Pattern[str], tail: str
) -> tuple[str, str]:
    """Return the start of an assistant turn, and what the generation prompt writes after it.

    `text` is the rendering of `chat`: its first answer shows which part of the generation prompt it begins with.
    """
    first = next(index for index, message in enumerate(chat.messages) if message["role"] == "assistant")
    before = _before_prompt(template, chat.messages[:first], tail)
    prompt = _generation_prompt(template, chat.messages[:first], tail)
    if not prompt or not text.startswith(before):
        return prompt, ""
    turn = text[len(before) :]
    written = turn[: turn.index(chat.messages[first]["content"])]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, written, strict=False))
    header = "".join(character for character, _ in same)
    if header != prompt:
        # The border is not inside a tag or token: `<think>` and `</think>` have the first character in common.
        header = re.sub(r"[<\[][^<>\[\]]*$", "", header)
        header = next(
            (prompt[: m.start()] for m in tokens.finditer(prompt) if m.start() < len(header) < m.end()), header
        )
    return header, prompt[len(header) :]


def _before_prompt(template: Template, prompt: list[Message], tail: str) -> str:
    try:
        plain = render_template(template, prompt)
    except BadRow:
        return ""
    return plain.rstrip().removesuffix(tail) if tail and plain.rstrip().endswith(tail) else plain


def _generation_prompt(template: Template, prompt: list[Message], tail: str) -> str:
    """Return the text that `add_generation_prompt` adds."""
    before = _before_prompt(template, prompt, tail)
    try:
        full = render_template(template, prompt, generation_prompt=True)
    except BadRow:
        return ""
    return full[len(before) :] if before and full.startswith(before) else ""


def _switched_prompts(
    template: Template, chat: Conversation, *, header: str, extra: str, tail: str
) -> dict[tuple[str, bool], str]:
    """Return what the generation prompt writes after the header if a variable of the template is true or false.

    Only texts that differ from `extra`, which it writes with the variables of the recipe, by variable and value.
    """
    switched = {}
    for name in sorted(template_names(template.source)):
        for value in (False, True):
            variables = {**template.variables, name: value}
            prompt = _generation_prompt(template._replace(variables=variables), chat.messages[:-1], tail)
            if prompt.startswith(header) and prompt[len(header) :] not in ("", extra):
                switched[name, value] = prompt[len(header) :]
            elif prompt == header and extra:
                switched[name, value] = ""
    return switched


def _reasoning_form(template: Template) -> ReasoningForm:
    """Return the form in which the template writes the reasoning of the last answer."""
    answer: Message = {"role": "assistant", "content": "probe answer text"}
    question: Message = {"role": "user", "content": "probe question text"}

    def rendered(message: Message) -> str | BadRow:
        return _try_render(template, Conversation([question, message], None))

    field = rendered({**answer, reasoning.FIELDS[0]: THOUGHT})
    inline = rendered({**answer, "content": reasoning.block(THOUGHT) + answer["content"]})
    if isinstance(field, str) and THOUGHT in field:
        return "as is" if field == inline else "field"
    return "inline" if isinstance(inline, str) and THOUGHT in inline else "omitted"


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
