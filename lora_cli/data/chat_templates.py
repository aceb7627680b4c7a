"""Chat templates: which one a run uses, the named ones for base models, and rendering in transformers' sandbox."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.data.conversation import Message
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError


class NamedTemplate(NamedTuple):
    """A template for base models that have none."""

    source: str
    tokens: tuple[str, ...]  # control tokens that the tokenizer must know as one id each


# Plain Jinja without {% generation %} marks: the template is saved with the adapter, and not every runtime that
# will read it knows the mark. Spans are found by rendering all the same.
NAMED_TEMPLATES: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": NamedTemplate(
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": NamedTemplate(
        "{% set state = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set state.system = message['content'] | trim + '\\n\\n' %}"
        "{% else %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{{ state.system + message['content'] | trim + '<end_of_turn>\\n' }}{% set state.system = '' %}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": NamedTemplate(
        "{% set state = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set state.system = message['content'] | trim + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + state.system + message['content'] | trim + ' [/INST]' }}{% set state.system = '' %}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% else %}{{ raise_exception('mistral has no role ' + message['role']) }}{% endif %}"
        "{% endfor %}",
        (),
    ),
    "alpaca": NamedTemplate(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\\n\\n' }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ raise_exception('alpaca has no role ' + message['role']) }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
        (),
    ),
}

# What a template's own code can raise on a row, besides raise_exception: it is a program that we did not write.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class Template(NamedTuple):
    """A chat template and the special tokens that it may write by name."""

    name: str  # for messages: `the tokenizer's chat template`
    source: str
    variables: dict[str, Any]


class MarkedText(NamedTuple):
    """A rendering, and the character ranges that `{% generation %}` marks in it."""

    text: str
    blocks: list[tuple[int, int]]


def resolve_template(
    setting: str | None, tokenizer: PreTrainedTokenizerBase, *, tools: bool = False
) -> Template | None:
    """The template that `data.chat_template` names, else the tokenizer's own, else None.

    Args:
        setting: name of a template, path of one, inline Jinja, or None.
        tokenizer: whose template, special tokens and habit of writing BOS count.
        tools: take the tokenizer's template for conversations with tools, where it has an own one for them.

    Raises:
        LoraError: there is no such template, it does not compile, or the tokenizer lacks its tokens.
    """
    if setting is not None:
        name, source = _chosen(setting, tokenizer)
    elif tokenizer.chat_template is None:
        return None
    else:
        try:
            name, source = "the tokenizer's chat template", tokenizer.get_chat_template(None, [] if tools else None)
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise LoraError(
                f"model: the tokenizer has several chat templates and none is the default: {names}",
                hint="copy the right one to a file and name it as data.chat_template",
            ) from None
    template = Template(name, source, dict(tokenizer.special_tokens_map))
    try:
        render_template(template, [{"role": "user", "content": "x"}])
    except jinja2.TemplateSyntaxError as error:
        raise LoraError(
            f"data.chat_template: {name}, line {error.lineno}: no valid Jinja: {error.message}",
            hint="mend the template",
        ) from None
    except BadRow:
        pass  # it compiles; whether it takes rows is seen on conversations that are whole
    return template


def _chosen(setting: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if "{{" in setting or "{%" in setting:
        return "the inline template", setting
    if setting in NAMED_TEMPLATES:
        return f"template {setting}", _named(setting, tokenizer)
    path = Path(setting).expanduser()
    if path.is_file():
        try:
            return f"template {setting}", path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise LoraError(f"data.chat_template: {path} is not UTF-8", hint="save it as UTF-8") from None
    close = difflib.get_close_matches(setting, NAMED_TEMPLATES, n=1)
    raise LoraError(
        f"data.chat_template: {setting} is no file and no template name",
        hint=f"did you mean {close[0]}?"
        if close
        else f"names are {', '.join(NAMED_TEMPLATES)}; else a path or inline Jinja",
    )


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    known = tokenizer.get_vocab()
    missing = [token for token in NAMED_TEMPLATES[name].tokens if token not in known]
    if missing:
        fitting = [other for other in NAMED_TEMPLATES if all(token in known for token in NAMED_TEMPLATES[other].tokens)]
        raise LoraError(
            f"data.chat_template: {name} needs {' '.join(missing)}, which this tokenizer does not have as one token",
            hint=f"templates that fit it: {', '.join(fitting)}",
        )
    # A base model that has always seen BOS first should see it here too.
    starts = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if starts and tokenizer.bos_token_id is not None else "") + NAMED_TEMPLATES[name].source


def render_template(
    template: Template,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    header: bool = False,
) -> str:
    """The conversation as text; with `header`, followed by what opens the assistant's next turn.

    Raises:
        BadRow: the template refuses the conversation or fails on it.
    """
    return _render(template, messages, tools, header=header, marks=False).text


def render_with_marks(
    template: Template, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> MarkedText:
    """The conversation as text, with what the template marks as generated.

    Raises:
        BadRow: the template refuses the conversation or fails on it.
    """
    return _render(template, messages, tools, header=False, marks=True)


def _render(
    template: Template,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    header: bool,
    marks: bool,
) -> MarkedText:
    try:
        texts, blocks = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template.source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=header,
            **template.variables,
        )
    except jinja2.TemplateSyntaxError:
        raise
    except TEMPLATE_ERRORS as error:
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadRow("refused by the chat template", f"the chat template refuses the row: {found}") from None
    return MarkedText(texts[0], blocks[0] if marks else [])
