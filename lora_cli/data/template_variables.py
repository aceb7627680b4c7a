"""Template variables (`enable_thinking`) and the date of a chat template: read, checked, written into its source.

Variables reach a template by `chat_template_kwargs` of a server. A saved template sets those of the run if the server
passes none, so that every runtime prompts the model as in training.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import meta, nodes

from lora_cli.data.records import BadRow
from lora_cli.data.rendering import in_template_process
from lora_cli.data.row_variables import KWARGS_COLUMN
from lora_cli.errors import LoraError

# What transformers and servers pass to every template.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
FUNCTIONS = frozenset(
    {"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner", "caller"}
)
# Directives of strftime; names of months and days as in the locale, the time of the day is 00:00.
DATE_DIRECTIVES = (
    "%-d",
    "%-m",
    "%-j",
    "%-H",
    "%-I",
    "%-M",
    "%-S",
    *(f"%{letter}" for letter in "aAbBcdfHIjmMpSUwWxXyY"),
)
DATE_DIRECTIVES += tuple(f"%{letter}" for letter in "DFTReuVGhzZ")


@cache
def template_names(source: str) -> frozenset[str]:
    """Return the names of the variables that a template reads, without messages, special tokens and functions.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid Jinja.
    """
    # In the process for templates: Jinja's code generator, which finds the names, computes constant expressions.
    return in_template_process("the chat template", _template_names, source)


def _template_names(source: str) -> frozenset[str]:
    tree = parse_template(source)
    names = {name for name in meta.find_undeclared_variables(tree) if not is_reserved(name)}
    # What a template sets in a branch and reads behind it counts as undeclared. It is a variable of the caller too if
    # the template asks whether it is defined, to set a default.
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]
    asked = {
        test.node.name
        for test in tests
        if test.name in ("defined", "undefined", "default", "d") and isinstance(test.node, nodes.Name)
    }
    return frozenset(names - (own - asked))


@cache
def template_keys(source: str) -> frozenset[str]:
    """Return the names of the keys of messages, tools and other objects that a template reads, and its other texts.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid Jinja.
    """
    tree = parse_template(source)
    texts = {text.value for text in tree.find_all(nodes.Const) if isinstance(text.value, str)}  # message["name"]
    return frozenset(texts | {field.attr for field in tree.find_all(nodes.Getattr)})


def is_reserved(name: str) -> bool:
    """Return whether the tool or the tokenizer sets the variable `name`, so that a recipe cannot."""
    return name in RESERVED or name in FUNCTIONS or name.endswith(("_token", "_tokens"))


def check_names(variables: Mapping[str, Any], sources: Sequence[str], *, key: str, template: str) -> None:
    """Check that a template reads the variables of a recipe.

    Args:
        variables: of the recipe.
        sources: of the template, and of that for conversations with tools.
        key: of the variables in the recipe, for messages.
        template: name of the template, for messages.

    Raises:
        LoraError: it reads no variable of this name, or the name is reserved.
    """
    if problem := _wrong_name(variables, sources, template):
        raise LoraError(f"{key}: {problem[0]}", hint=problem[1])


def check_row_names(variables: Mapping[str, Any], source: str) -> None:
    """Check that a template reads the variables of a row.

    Raises:
        BadRow: it reads no variable of this name, or the name is reserved.
    """
    if problem := _wrong_name(variables, [source], "the chat template"):
        raise BadRow("unknown template variable", f"{problem[0]}; {problem[1]}", field=KWARGS_COLUMN)


def _wrong_name(variables: Mapping[str, Any], sources: Sequence[str], template: str) -> tuple[str, str] | None:
    if reserved := [name for name in variables if is_reserved(name)]:
        return f"{reserved[0]} is set by the tool itself and cannot be changed", "remove it"
    known = {name for source in sources for name in template_names(source)}
    for name in variables:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        listed = f"it reads {', '.join(sorted(known))}" if known else "it reads no variables: remove it"
        return f"{template} reads no variable {name}", f"did you mean {close[0]}? {listed}" if close else listed
    return None


def with_defaults(source: str, variables: Mapping[str, Any]) -> str:
    """Return the template with `variables` as defaults: each is set at its top unless the runtime passes it."""
    # In the form that published templates use for their own defaults, which every runtime's Jinja supports.
    lines = [
        f"{{%- if not {name} is defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in sorted(variables.items())
        if name in template_names(source)
    ]
    return "".join(lines) + source


def _literal(value: object) -> str:
    """Return a JSON value as Jinja."""
    match value:
        case None:
            return "none"
        case dict():
            return "{" + ", ".join(f"{_literal(str(key))}: {_literal(each)}" for key, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)


# --- the date -------------------------------------------------------------------------------------------------------


def uses_date(source: str) -> bool:
    """Return whether the template writes today's date (`strftime_now`).

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid Jinja.
    """
    if "strftime_now" not in source:
        return False
    calls = parse_template(source).find_all(nodes.Call)
    return any(isinstance(call.node, nodes.Name) and call.node.name == "strftime_now" for call in calls)


def with_date(source: str, day: date) -> str:
    """Return the template with `day` in place of today: it defines `strftime_now` itself. Unchanged if it uses none."""
    if not uses_date(source):
        return source
    moment = datetime(day.year, day.month, day.day)
    texts = {directive: moment.strftime(directive) for directive in DATE_DIRECTIVES}
    # transformers passes data to templates, not functions: hence a macro. Its line break is trimmed in rendering.
    return (
        "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
        f"{{% for key, value in {_literal(texts)}.items() %}}"
        "{% set now.text = now.text.replace(key, value) %}{% endfor %}{{ now.text }}{% endmacro %}\n" + source
    )


def parse_template(source: str) -> nodes.Template:
    """Return the syntax tree of a template; nothing of it is run.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid Jinja.
    """
    # transformers adds the tag `generation`; its body is the same without it.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)
    try:
        return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except RecursionError:
        raise jinja2.TemplateSyntaxError("nested too deeply", 1) from None
