"""Render conversations with chat templates, which are programs of unknown origin: in a child process, with limits.

A template is Jinja in transformers' sandbox, which keeps it from Python's objects, not from loops that never end and
texts that fill the memory. So this process renders nothing itself: `render_template` and `in_template_process` pass the
work to a child that can be ended (`run/child_process.py`), also for single conversations and templates of our own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jinja2
from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.data.conversation import Message
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError, first_line
from lora_cli.run.child_process import ChildProcess, Ended, Limits, is_child

P = ParamSpec("P")
T = TypeVar("T")

# A conversation takes a tenth of a millisecond, one of a million tokens less than a second.
LIMITS = Limits(cpu_s=10.0, memory=1 << 30)
MAX_TEXT = 1 << 25  # characters of a rendered conversation: twice the longest row, see `row_size.py`
FIX_HINT = "correct the template, or use another one (in a recipe: data.chat_template)"
TRUST_HINT = "do not trust this template or its model; a recipe can set another template: data.chat_template"

# Errors that the code of a template can raise on a row, in addition to raise_exception.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    NameError,  # of `inf`, which Jinja's compiler writes for 1e999
    ArithmeticError,
    RecursionError,
    RuntimeError,  # a dictionary that changes while it is iterated
    AssertionError,  # of Jinja's compiler
    SyntaxError,  # of Python's, as for more than twenty nested loops
)

# Attributes of Python's objects from which code can be reached, of those that jinja2.sandbox does not allow.
INNER_ATTRIBUTE = re.compile(r"_|mro$|gi_|cr_|ag_|f_|im_|func_|tb_|co_")
_undefined_of_jinja = SandboxedEnvironment.unsafe_undefined

_child = ChildProcess(LIMITS, (LoraError, BadRow, jinja2.TemplateSyntaxError))


class _LeavesSandbox(Exception):
    """A template reads an attribute from which code can be reached."""


class Template(NamedTuple):
    """A chat template and the variables that it can refer to by name."""

    name: str  # for messages: `the tokenizer's chat template`
    source: str
    variables: dict[str, Any]  # special tokens and those of the recipe: {"eos_token": "</s>", "enable_thinking": False}
    typed: bool = False  # it renders the content of a message only as a list of parts with types


class RenderedText(NamedTuple):
    """A rendered conversation and its `{% generation %}` blocks."""

    text: str
    blocks: list[tuple[int, int]]  # start and end in characters


def template_process() -> ChildProcess:
    """Return the child process of this process that renders templates, for requests with many results."""
    return _child


def in_template_process(template: str, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return the result of a function that renders conversations; `template` is the template's name for messages.

    Raises:
        LoraError: it needs too much time or memory; or the function raises it, as BadRow and TemplateSyntaxError.
    """
    if is_child():
        return function(*arguments, **options)
    try:
        return _child.call(function, *arguments, **options)
    except Ended as ended:
        raise LoraError(f"{template} {ended.detail}: its loops or texts do not end", hint=FIX_HINT) from None


def render_template(
    template: Template,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    generation_prompt: bool = False,
) -> str:
    """Render a conversation to text; with `generation_prompt`, append the header of the next assistant turn.

    Raises:
        BadRow: the template rejects the conversation or fails on it.
        LoraError: it needs too much time or memory, or tries to leave the sandbox.
    """
    options = {"generation_prompt": generation_prompt, "with_blocks": False}
    return in_template_process(template.name, _render, template, messages, tools, **options).text


def render_with_generation_blocks(
    template: Template, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> RenderedText:
    """Render a conversation to text, and return the `{% generation %}` blocks of the template with it.

    Raises:
        BadRow: the template rejects the conversation or fails on it.
        LoraError: it needs too much time or memory, or tries to leave the sandbox.
    """
    options = {"generation_prompt": False, "with_blocks": True}
    return in_template_process(template.name, _render, template, messages, tools, **options)


def _render(
    template: Template,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool,
    with_blocks: bool,
) -> RenderedText:
    assert is_child(), "a template must not run in a process that it can end"
    # In this process only.
    SandboxedEnvironment.unsafe_undefined = _unsafe_undefined  # type: ignore[assignment, method-assign]
    try:
        texts, blocks = render_jinja_template(
            conversations=[typed_content(messages) if template.typed else list(messages)],
            tools=tools,
            chat_template=template.source,
            return_assistant_tokens_mask=with_blocks,
            add_generation_prompt=generation_prompt,
            **template.variables,
        )
    except jinja2.TemplateSyntaxError:
        raise
    except _LeavesSandbox as error:
        raise LoraError(f"{template.name} tries to leave its sandbox: {error}", hint=TRUST_HINT) from None
    except TEMPLATE_ERRORS as error:
        raise _rejected(error) from None
    if len(texts[0]) > MAX_TEXT:
        problem = f"the chat template writes {len(texts[0]):,} characters for the row, more than {MAX_TEXT:,}"
        raise BadRow("too long text of the chat template", problem)
    return RenderedText(texts[0], blocks[0] if with_blocks else [])


def _unsafe_undefined(environment: SandboxedEnvironment, value: Any, attribute: str) -> jinja2.Undefined:
    """Raise for an attribute that only an attack reads; Jinja returns a value that is written as an empty text."""
    if INNER_ATTRIBUTE.match(attribute):
        raise _LeavesSandbox(f"it reads {attribute!r} of a value of type {type(value).__name__}")
    return _undefined_of_jinja(environment, value, attribute)


def _rejected(error: Exception) -> BadRow:
    return BadRow("rejected by the chat template", f"the chat template rejects the row: {first_line(error)}")


def typed_content(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return `messages` with each text as a list of one part, `{"type": "text", "text": ...}`."""
    typed = []
    for message in messages:
        text = message.get("content")
        content = [{"type": "text", "text": text}] if isinstance(text, str) else text
        typed.append({**message, "content": content})
    return typed
