"""Check a chat template before it is used or copied: it ends, fits in memory, and does not try to leave its sandbox."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from lora_cli.data.conversation import Message
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import FIX_HINT, TRUST_HINT, Template, in_template_process, render_template
from lora_cli.data.template_variables import parse_template
from lora_cli.errors import LoraError, first_line
from lora_cli.run.read_file import read_json_object, read_text

MAX_TEMPLATE = 1 << 18  # characters: the longest that is known has a tenth of it
TYPED_PROBE = "zebra"  # a word that no template writes itself

PROBE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# Conversations that every template is tried on before it is used: one question; several turns; a call of a tool.
FUNCTION = {"name": "probe_tool", "arguments": {"key": "value"}}
TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "A probe.", "parameters": {}}}
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": TYPED_PROBE}],
    [
        {"role": "system", "content": "Answer."},
        *[{"role": role, "content": "A text."} for role in ("user", "assistant", "user")],
    ],
    [
        {"role": "user", "content": "A text."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "probe0000", "function": FUNCTION}],
        },
        {"role": "tool", "name": "probe_tool", "content": "1"},
        {"role": "assistant", "content": "A text."},
    ],
)


def check_tokenizer_templates(tokenizer: PreTrainedTokenizerBase, where: str, *, must_parse: bool = False) -> None:
    """Check all chat templates of a tokenizer, which a command uses or copies into its result.

    Args:
        tokenizer: of a model or adapter.
        where: its folder or hub id, for messages.
        must_parse: whether a template that is not valid Jinja is an error; else, what uses it reports that.

    Raises:
        LoraError: rendering a short conversation does not end, or the template tries to leave its sandbox.
    """
    found = tokenizer.chat_template
    templates = found if isinstance(found, dict) else {} if found is None else {"": found}
    for key, source in templates.items():
        name = f"the chat template {key} of {where}" if key else f"the chat template of {where}"
        try:
            checked_template(name, source, tokenizer.special_tokens_map)
        except jinja2.TemplateSyntaxError as error:
            if must_parse:
                message = f"{name}, line {error.lineno}: not valid Jinja: {first_line(error)}"
                raise LoraError(message, hint=FIX_HINT) from None


def check_template_files(folder: Path) -> None:
    """Check the chat templates in a tokenizer's files, for a command that copies them without loading the tokenizer.

    Raises:
        LoraError: as `check_tokenizer_templates`, or a file cannot be read.
    """
    templates: list[object] = []
    if os.path.lexists(folder / "chat_template.jinja"):
        templates.append(read_text(folder / "chat_template.jinja"))
    if os.path.lexists(folder / "tokenizer_config.json"):
        stored = read_json_object(folder / "tokenizer_config.json").get("chat_template")
        # Several templates: [{"name": "default", "template": "..."}, ...]
        templates += [stored] if isinstance(stored, str) else stored if isinstance(stored, list) else []
    for template in templates:
        source = template.get("template") if isinstance(template, dict) else template
        with suppress(jinja2.TemplateSyntaxError):
            checked_template(f"the chat template of {folder}", source, PROBE_TOKENS)


def checked_template(name: str, source: object, tokens: Mapping[str, Any]) -> Template:
    """Return a template after it rendered a few short conversations within the limits of its process.

    Args:
        name: for messages.
        source: of the template; what a damaged file has in its place is refused.
        tokens: the tokenizer's special tokens, which the template can refer to by name.

    Raises:
        LoraError: it did not, or it tries to leave its sandbox.
        jinja2.TemplateSyntaxError: it is not valid Jinja.
    """
    if not isinstance(source, str):
        raise LoraError(f"{name} is not a text", hint=FIX_HINT)
    if len(source) > MAX_TEMPLATE:
        raise LoraError(f"{name} has {len(source):,} characters, more than {MAX_TEMPLATE:,}", hint=FIX_HINT)
    variables = dict(tokens)
    return Template(
        name, source, variables, _try_template(name, source, json.dumps(variables, sort_keys=True, default=str))
    )


@lru_cache(maxsize=64)
def _try_template(name: str, source: str, variables: str) -> bool:
    """Return `Template.typed`; cached, because each step of a command asks for the same templates."""
    return in_template_process(name, _inspect, Template(name, source, json.loads(variables)))


def _inspect(template: Template) -> bool:
    """Return whether a text is in the rendered chat only if it is a part of the content; in the child process.

    Raises:
        LoraError: the template tries to leave its sandbox.
        jinja2.TemplateSyntaxError: the template does not compile.
    """
    try:
        for reason in _ways_out(parse_template(template.source)):
            raise LoraError(f"{template.name} tries to leave its sandbox: {reason}", hint=TRUST_HINT)
    except RecursionError:
        raise jinja2.TemplateSyntaxError("nested too deeply", 1) from None
    typed = next(
        (typed for typed in (False, True) if TYPED_PROBE in _probe(template._replace(typed=typed), PROBES[0])), False
    )
    for messages in PROBES[1:]:
        for tools in (None, [TOOL]):
            _probe(
                template._replace(typed=typed), messages, tools, generation_prompt=messages[-1]["role"] != "assistant"
            )
    return typed


def _probe(
    template: Template,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    generation_prompt: bool = False,
) -> str:
    try:
        return render_template(template, messages, tools, generation_prompt=generation_prompt)
    except BadRow:  # infer_template_format tests it on complete conversations
        return ""


def _ways_out(tree: nodes.Template) -> Iterator[str]:
    """Yield what a template does that only an attack does: it reads Python's own attributes, or other files."""
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield f"line {node.lineno} reads another file ({type(node).__name__.lower()})"
    for field in tree.find_all(nodes.Getattr):
        if is_dunder(field.attr):
            yield f"line {field.lineno} reads {field.attr}"
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and is_dunder(item.arg.value):
            yield f"line {item.lineno} reads {item.arg.value}"
    for filter_ in tree.find_all(nodes.Filter):
        names = [each.value for each in filter_.args if isinstance(each, nodes.Const) and is_dunder(each.value)]
        if names:
            yield f"line {filter_.lineno} reads {names[0]} by the filter {filter_.name}"


def is_dunder(name: object) -> bool:
    """Return whether a name is of the form `__class__`."""
    return isinstance(name, str) and name.startswith("__") and name.endswith("__")
