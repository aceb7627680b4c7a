"""Choose the chat template of a run, define the named templates, and render conversations with transformers."""

import difflib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.data.conversation import Message
from lora_cli.data.records import BadRow
from lora_cli.data.template_variables import check_names, uses_date, with_date, with_defaults
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec


class NamedTemplate(NamedTuple):
    """A chat template for base models without one."""

    source: str
    tokens: tuple[str, ...]  # control tokens, which the tokenizer must have as single tokens


# Plain Jinja without {% generation %} blocks: the template is saved with the adapter, and not every runtime supports
# these blocks. Assistant spans are found without them.
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

# Errors that the code of a template can raise on a row, in addition to raise_exception.
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


TYPED_PROBE = "zebra"  # a word that no template writes itself


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


def resolve_template(
    setting: str | None, tokenizer: PreTrainedTokenizerBase, *, tools: bool = False, day: date | None = None
) -> Template | None:
    """Return the template of `data.chat_template`, else the tokenizer's own, else None.

    Args:
        setting: name or path of a template, inline Jinja, or None.
        tokenizer: provides its template, its special tokens and whether it adds BOS.
        tools: use the tokenizer's template for conversations with tools, if it has a separate one.
        day: the date that the template writes in place of today's, if it writes one.

    Raises:
        LoraError: the template does not exist or does not compile, or the tokenizer lacks its tokens.
    """
    if setting is not None:
        name, source = _template_of_setting(setting, tokenizer)
    elif tokenizer.chat_template is None:
        return None
    else:
        try:
            name, source = "the tokenizer's chat template", tokenizer.get_chat_template(None, [] if tools else None)
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise LoraError(
                f"model: the tokenizer has several chat templates and no default: {names}",
                hint="copy the right one to a file and set data.chat_template to its path",
            ) from None
    template = Template(name, source, dict(tokenizer.special_tokens_map))
    try:
        template = template._replace(typed=_needs_typed_content(template))
    except jinja2.TemplateSyntaxError as error:
        raise LoraError(
            f"data.chat_template: {name}, line {error.lineno}: not valid Jinja: {error.message}",
            hint="fix the template",
        ) from None
    return template._replace(source=with_date(source, day)) if day else template


def writes_date(setting: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a template of `resolve_template` writes today's date.

    Raises:
        LoraError: as `resolve_template`.
    """
    templates = (resolve_template(setting, tokenizer, tools=tools) for tools in (False, True))
    return any(template is not None and uses_date(template.source) for template in templates)


def check_template_variables(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the chat template reads the template variables of a recipe's data section and sources.

    Raises:
        LoraError: it does not read one of them, or there is no template.
    """
    by_key = {"data.template_variables": spec.template_variables}
    for key, sources in (("data.train", spec.train), ("data.eval", spec.eval)):
        if isinstance(sources, list):
            by_key |= {f"{key}[{i}].template_variables": source.template_variables for i, source in enumerate(sources)}
    for key, variables in by_key.items():
        if not variables:
            continue
        templates = [resolve_template(spec.chat_template, tokenizer, tools=tools) for tools in (False, True)]
        known = [template for template in templates if template is not None]
        if not known:
            raise LoraError(f"{key}: the tokenizer has no chat template", hint="remove it, or set data.chat_template")
        check_names(variables, [template.source for template in known], key=key, template=known[0].name)


def shared_variables(spec: DataSpec) -> dict[str, Any]:
    """Return the template variables that all training sources have in common."""
    if isinstance(spec.train, str):
        return dict(spec.template_variables)
    first, *others = ({**spec.template_variables, **source.template_variables} for source in spec.train)
    return {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}


def saved_template(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """Return the chat template to save with an adapter: it must prompt the adapter as in training.

    The template of the recipe if it sets one, else the tokenizer's, with the template variables that all training
    sources share as defaults.
    """
    shared = shared_variables(spec)
    template: str | dict[str, str] | None = tokenizer.chat_template
    if spec.chat_template is not None:
        resolved = resolve_template(spec.chat_template, tokenizer)
        template = resolved.source if resolved else None
    if not shared or template is None:
        return template
    if isinstance(template, dict):
        return {name: with_defaults(source, shared) for name, source in template.items()}
    return with_defaults(template, shared)


def needs_typed_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's template, such as LLaVA's, loses texts that are not in `typed_content`."""
    template = resolve_template(None, tokenizer)
    return template is not None and template.typed


def typed_content(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return `messages` with each text as a list of one part, `{"type": "text", "text": ...}`."""
    typed = []
    for message in messages:
        text = message.get("content")
        content = [{"type": "text", "text": text}] if isinstance(text, str) else text
        typed.append({**message, "content": content})
    return typed


def _needs_typed_content(template: Template) -> bool:
    """Return whether a text is in the rendered chat only if it is a part of the content.

    Raises:
        jinja2.TemplateSyntaxError: the template does not compile.
    """
    for typed in (False, True):
        try:
            if TYPED_PROBE in render_template(
                template._replace(typed=typed), [{"role": "user", "content": TYPED_PROBE}]
            ):
                return typed
        except BadRow:  # infer_template_format tests it on complete conversations
            continue
    return False


def _template_of_setting(setting: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if "{{" in setting or "{%" in setting:
        return "the inline template", setting
    if setting in NAMED_TEMPLATES:
        return f"template {setting}", _named_template(setting, tokenizer)
    path = Path(setting).expanduser()
    if path.is_file():
        try:
            return f"template {setting}", path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise LoraError(f"data.chat_template: {path} is not UTF-8", hint="save it as UTF-8") from None
    close = difflib.get_close_matches(setting, NAMED_TEMPLATES, n=1)
    raise LoraError(
        f"data.chat_template: {setting} is neither a file nor a template name",
        hint=f"did you mean {close[0]}?"
        if close
        else f"use a template name ({', '.join(NAMED_TEMPLATES)}), a path or inline Jinja",
    )


def _named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    vocab = tokenizer.get_vocab()
    missing = [token for token in NAMED_TEMPLATES[name].tokens if token not in vocab]
    if missing:
        fitting = [other for other in NAMED_TEMPLATES if all(token in vocab for token in NAMED_TEMPLATES[other].tokens)]
        raise LoraError(
            f"data.chat_template: {name} needs {' '.join(missing)}, which are not single tokens of this tokenizer",
            hint=f"templates that fit this tokenizer: {', '.join(fitting)}",
        )
    # If the tokenizer adds BOS, the base model was trained with it, so that the template must write it too.
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if adds_bos and tokenizer.bos_token_id is not None else "") + NAMED_TEMPLATES[name].source


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
    """
    return _render(template, messages, tools, generation_prompt=generation_prompt, with_blocks=False).text


def render_with_generation_blocks(
    template: Template, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> RenderedText:
    """Render a conversation to text, and return the `{% generation %}` blocks of the template with it.

    Raises:
        BadRow: the template rejects the conversation or fails on it.
    """
    return _render(template, messages, tools, generation_prompt=False, with_blocks=True)


def _render(
    template: Template,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool,
    with_blocks: bool,
) -> RenderedText:
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
    except TEMPLATE_ERRORS as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadRow("rejected by the chat template", f"the chat template rejects the row: {first_line}") from None
    return RenderedText(texts[0], blocks[0] if with_blocks else [])
