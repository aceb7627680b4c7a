"""The part of the fault campaign with chat templates: hostile ones, and mutations of those of known models.

for case in template_cases(seed): outcome = try_template(case, folder)    # endless: take as many as wanted
"""

import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.data import rendering
from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.schema import DataSpec
from lora_cli.run.child_process import ChildProcess, Limits
from tests.faults import mutate
from tests.faults.outcome import Outcome, run_case
from tests.inputs.chat_models import MODELS
from tests.inputs.tiny_tokenizers import CHATML, GEMMA, LLAMA3, MARKED, MISTRAL, QWEN3, build

# Limits of the campaign: a tenth of the usual ones, because every case that reaches them waits for them.
CAMPAIGN_LIMITS = Limits(cpu_s=1.0, memory=1 << 27)

LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(80) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
RECURSIVE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
LATE = "{% if messages | length > 2 %}" + LOOP + "{% endif %}"
# Templates that take too much time or memory, in front of a template that works.
ENDLESS: dict[str, str] = {
    "loop": LOOP,
    "loop of three": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}",
    "filters": "{{ range(99999) | map('string') | join | length }}" * 2 + LOOP,
    "recursion without end": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursion of two": RECURSIVE,
    "recursive loop": "{% for x in [messages] recursive %}{{ loop([messages]) }}{{ loop([messages]) }}{% endfor %}",
    "repetition": "{{ 'ab' * 1400000000 }}",
    "repetition at run time": "{{ (messages[0].content + 'ab') * 1400000000 }}",
    "list repetition": "{% set x = [messages] * 1000000000 %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "power at run time": "{{ (messages | length + 9) ** (10 ** 9) > 1 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling": DOUBLING,
    "doubling by replacement": "{% set ns = namespace(x='aa') %}{% for i in range(40) %}"
    "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "comparison in C": NESTED + NESTED.replace("ns", "other") + "{{ ns.x == other.x }}",
    "hash in C": "{% set ns = namespace(x=(1,)) %}{% for i in range(80) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{% set d = {ns.x: 1} %}",
    "text of nested lists": NESTED + "{{ ns.x }}",
    "tojson of nested lists": NESTED + "{{ ns.x | tojson }}",
    "center": "{{ 'a' | center(2000000000) }}",
    "format width": "{{ '%2000000000d' % 5 }}",
    "str.format width": "{{ '{:>2000000000}'.format(5) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "expandtabs": "{{ '\\t\\t'.expandtabs(2000000000) }}",
    "indent": "{{ ('a\\n' * 1000) | indent(10000000) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "wordwrap": "{{ ('a' * 100000000) | wordwrap(1) }}",
    "batch": "{% for x in messages | batch(2000000000, 'x') %}{% endfor %}",
    "slice": "{% for x in messages | slice(2000000000) %}{% endfor %}",
    "sum of lists": "{% set x = [range(50000) | list] * 50000 %}{{ x | sum(start=[]) | length }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "only long conversations": LATE,
    "only some rows": "{% if 'What is 7' in messages[0].content %}" + LOOP + "{% endif %}",
    "only the generation prompt": "{% if add_generation_prompt %}" + LOOP + "{% endif %}",
    "only tools": "{% if tools %}" + LOOP + "{% endif %}",
}
# Templates that try to reach Python, other files, or the process.
ESCAPES: dict[str, str] = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__globals__ }}",
    "item": "{{ ''['__class__'] }}",
    "attr": "{{ '' | attr('__class__') }}",
    "attr of parts": "{{ '' | attr('__cl' + 'ass__') }}",
    "attr of parts at run time": "{% set a = '__cl' %}{{ '' | attr(a + 'ass__') }}",
    "item of parts": "{% set a = '__cl' %}{{ ''[a ~ 'ass__'] }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format at run time": "{% set a = '{0.__cl' %}{{ (a + 'ass__}').format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map attribute": "{{ messages | map(attribute='__class__') | list }}",
    "only in tests": "{% if ''.__class__ is defined %}{% endif %}",
    "only some rows": "{% if 'What is 7' in messages[0].content %}{% set a = '__cl' %}{{ '' | attr(a + 'ass__') }}"
    "{% endif %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from import": "{% from 'os' import system %}",
    "extends": "{% extends '/etc/passwd' %}",
    "self": "{{ self.__init__.__globals__ }}",
    "frame": "{{ (messages | map('upper')).gi_frame }}",
    "change": "{{ messages.append(1) }}",
    "change a message": "{{ messages[0].update({'role': 'x'}) }}",
}
# Texts that are no template, or break Jinja's compiler or Python's.
BROKEN: dict[str, str] = {
    "syntax": "{% for %}",
    "unclosed": "{{ messages",
    "many brackets": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "very many brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "many lists": "{{ " + "[" * 150 + "]" * 150 + " }}",
    "many loops": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "very many loops": "{% for a in messages %}" * 3000 + "{% endfor %}" * 3000,
    "many conditions": "{% if messages %}" * 150 + "{% endif %}" * 150,
    "long sum": "{{ " + " + ".join(["1"] * 5000) + " }}",
    "long concatenation": "{{ " + " ~ ".join(["'a'"] * 5000) + " }}",
    "long filter chain": "{{ 'a'" + " | upper" * 3000 + " }}",
    "large": "{# " + "x" * (1 << 19) + " #}",
    "raw without end": "{% raw %}" * 20_000,
    "comments": "{# #}" * 60_000,
    "unknown tag": "{% system %}",
    "unknown filter": "{{ messages | shell }}",
    "NUL": "\0",
    "surrogate": "\ud800{{ messages }}",
    "empty": "{% set x = 1 %}",
    "keyword": "{% set None = 1 %}",
    "raise": "{{ raise_exception('a\\nb\\x1b[2J') }}",
    "raise nothing": "{{ raise_exception() }}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ a.b.c }}",
    "generation": "{% generation %}{% generation %}{{ 1 }}{% endgeneration %}{% endgeneration %}",
}
PARTS = {
    **{f"endless: {name}": source for name, source in ENDLESS.items()},
    **{f"escape: {name}": source for name, source in ESCAPES.items()},
    **{f"broken: {name}": source for name, source in BROKEN.items()},
}
KNOWN = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3, "marked": MARKED}


class TemplateCase(NamedTuple):
    """A chat template."""

    name: str
    source: str


def template_cases(seed: int) -> Iterator[TemplateCase]:
    """Yield all hostile templates, then mutations of those of known models without end."""
    for name, part in PARTS.items():
        yield TemplateCase(name, part + CHATML)
    known = {**KNOWN, **{name: _template_of(name) for name in MODELS}}
    for number in itertools.count():
        for name, source in known.items():
            mutation = mutate.mutate_text(source, f"{seed} {number} {name}")
            yield TemplateCase(f"{name}, {seed} {number}: {mutation.name}", mutation.value)


def _template_of(name: str) -> str:
    template = MODELS[name].tokenizer().chat_template
    return str(template["default"] if isinstance(template, dict) else template)


def try_template(case: TemplateCase, folder: Path) -> Outcome:
    """Prepare conversations with the template, as `lora train` does with that of a model."""
    rows = folder / "template_rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in _rows()))

    def prepare() -> None:
        rendering._child = ChildProcess(CAMPAIGN_LIMITS, rendering._child._errors)
        tokenizer = _tokenizer()
        tokenizer.chat_template = case.source
        spec = DataSpec(train=str(rows), eval=None, max_length=100_000_000)
        try:
            prepare_data(spec, tokenizer, seed=0, cache=folder / f"cache-{hash(case)}", info=lambda line: None)
        finally:
            rendering._child.close()

    return run_case(prepare)


def _rows() -> list[dict[str, Any]]:
    def turns(number: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"What is {number}?"}
        return [question, {"role": "assistant", "content": f"It is {number}."}]

    return [{"messages": turns(number) * (1 + number % 3)} for number in range(20)]


@cache
def _tokenizer() -> Any:
    return build("<|im_start|>", "<|endoftext|>", "<|eot_id|>", eos="<|im_end|>", template=CHATML)
