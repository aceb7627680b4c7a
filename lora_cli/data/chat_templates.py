"""Choose the chat template of a run: that of the recipe (a name, a path, inline Jinja), else the tokenizer's."""

import difflib
import os
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lora_cli.data.check_template import MAX_TEMPLATE, checked_template
from lora_cli.data.named_templates import NAMED_TEMPLATES
from lora_cli.data.rendering import Template
from lora_cli.data.template_variables import check_names, uses_date, with_date, with_defaults
from lora_cli.errors import LoraError, first_line
from lora_cli.recipe.schema import DataSpec
from lora_cli.run.read_file import read_text


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
        LoraError: the template does not exist, does not compile, does not end or tries to leave its sandbox, or the
            tokenizer lacks its tokens.
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
    try:
        template = checked_template(name, source, tokenizer.special_tokens_map)
    except jinja2.TemplateSyntaxError as error:
        raise LoraError(
            f"data.chat_template: {name}, line {error.lineno}: not valid Jinja: {first_line(error)}",
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


def _template_of_setting(setting: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if "{{" in setting or "{%" in setting:
        return "the inline template", setting
    if setting in NAMED_TEMPLATES:
        return f"template {setting}", _named_template(setting, tokenizer)
    path = os.path.expanduser(setting)
    if os.path.lexists(path):
        hint = "data.chat_template takes a name, inline Jinja, or the path of a text file in UTF-8"
        return f"template {setting}", read_text(Path(path), limit=4 * MAX_TEMPLATE, hint=hint)
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
