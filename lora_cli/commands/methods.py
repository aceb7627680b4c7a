"""`lora methods`: print each adapter method with its summary, recipe keys, supported bases and limits. No torch."""

from typing import Any

from lora_cli.recipe.methods import METHOD_FACTS, MethodFacts
from lora_cli.run import console


def show_methods() -> dict[str, Any]:
    """Print the methods one by one; return their facts for JSON."""
    for name, facts in METHOD_FACTS.items():
        console.out.print(f"{name}: {facts.summary}")
        console.out.print(f"  keys: {', '.join(_key(key, value) for key, value in facts.options.items())}")
        console.out.print(f"  {_limits(facts)}")
    return {name: _record(facts) for name, facts in METHOD_FACTS.items()}


def _record(facts: MethodFacts) -> dict[str, Any]:
    return {
        "summary": facts.summary,
        "keys": facts.options,  # with their defaults
        "bits": [facts.needs_bits] if facts.needs_bits else [None, *facts.bits],  # null: unquantized
        "tasks": facts.tasks,
        "packing": facts.supports_packing,
        "mergeable": facts.mergeable,
    }


def _key(key: str, default: Any) -> str:
    return key if default is None else f"{key} ({str(default).lower() if isinstance(default, bool) else default})"


def _limits(facts: MethodFacts) -> str:
    if facts.needs_bits:
        bases = f"on {facts.needs_bits}-bit bases only"
    elif not facts.bits:
        bases = "on unquantized bases only"
    else:
        *first, last = "unquantized", *(f"{bits}-bit" for bits in facts.bits)
        bases = f"on {', '.join(first)} and {last} bases"
    packs = "rows can be packed" if facts.supports_packing else "no packing"
    merges = "can be merged" if facts.mergeable else "cannot be merged"
    return f"{bases}; {packs}; {merges}"
