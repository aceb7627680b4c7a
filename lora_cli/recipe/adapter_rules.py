"""Rules of the adapter section: options, quantization, target modules and regexes of each method. No torch."""

import re
from collections.abc import Iterator

from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.problem import Conflict, join_words, shorten
from lora_cli.recipe.schema import AdapterSpec, Recipe


def check_method(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of the adapter method with its options and with the rest of the recipe."""
    spec, facts = recipe.adapter, METHOD_FACTS[recipe.adapter.method]
    by = f"method {spec.method}"
    for name in AdapterSpec.model_fields:
        if name not in ("method", "source") and name not in facts.options and getattr(spec, name) is not None:
            methods = [other for other, other_facts in METHOD_FACTS.items() if name in other_facts.options]
            named_fix = f"remove it; it is an option of {join_words(list(methods), 'and')}"
            fix = named_fix if len(methods) < 4 else "remove it"
            yield Conflict(f"adapter.{name}", f"has no effect with {by}", fix, ("adapter.method",))
    if recipe.task not in facts.tasks:
        fix = f"write another method, or task {join_words(list(facts.tasks))}"
        yield Conflict("adapter.method", f"{spec.method} does not support task {recipe.task}", fix, ("task",))
    if recipe.data.packing and not facts.supports_packing:
        message = f"{by} puts virtual tokens before each row, so rows cannot be packed"
        yield Conflict("data.packing", message, "write packing: false, or remove it", ("adapter.method",))
    if recipe.training.gradient_checkpointing is True and spec.method == "prefix":
        message = f"{by} passes its keys and values in the cache, which gradient checkpointing does not support"
        yield Conflict("training.gradient_checkpointing", message, "write false or auto", ("adapter.method",))
    yield from _check_bits(recipe)
    if spec.final_rank and spec.rank and spec.final_rank > spec.rank:
        message = f"{spec.final_rank} is above adapter.rank, {spec.rank}, which adalora starts with"
        yield Conflict("adapter.final_rank", message, "lower it, or raise adapter.rank", ("adapter.rank",))
    if spec.method == "ia3":
        yield from _check_ia3(spec)
    for key in ("modules_to_save", "trainable_tokens", "layers", "feedforward_modules"):
        yield from check_list(f"adapter.{key}", getattr(spec, key))


def _check_bits(recipe: Recipe) -> Iterator[Conflict]:
    method, facts = recipe.adapter.method, METHOD_FACTS[recipe.adapter.method]
    bits = recipe.quantization.bits if recipe.quantization else None
    depends_on = ("quantization", "quantization.bits")
    if facts.needs_bits and bits != facts.needs_bits:
        message = f"{method} needs a {facts.needs_bits}-bit base, whose quantization error it corrects"
        fix = f"write quantization: {{bits: {facts.needs_bits}}}, or another method"
        yield Conflict("adapter.method", message, fix, depends_on)
    elif bits and bits not in facts.bits:
        supported = join_words([str(b) for b in facts.bits])
        reason = facts.no_quantization_reason or f"PEFT supports it with {supported} bits only"
        fix = "remove the quantization section, or write method lora"
        if facts.bits:
            fix = f"write bits: {facts.bits[0]}, or method lora"
        yield Conflict(
            "adapter.method", f"{method} does not support {bits}-bit quantization: {reason}", fix, depends_on
        )


def _check_ia3(spec: AdapterSpec) -> Iterator[Conflict]:
    """Yield conflicts of ia3: without target_modules, PEFT's table of the architecture applies, unchanged."""
    depends_on = ("adapter.target_modules",)
    for key in ("exclude_modules", "feedforward_modules"):
        if spec.target_modules is None and getattr(spec, key):
            message = "has no effect without target_modules: PEFT's defaults for the architecture apply"
            yield Conflict(f"adapter.{key}", message, "write target_modules too, or remove it", depends_on)
    if isinstance(spec.target_modules, list) and spec.feedforward_modules:
        for index, name in enumerate(spec.feedforward_modules):
            if name and name not in spec.target_modules:
                message = f"{shorten(name)} is not in target_modules"
                yield Conflict(f"adapter.feedforward_modules[{index}]", message, "add it there too", depends_on)


def check_list(key: str, items: list[str] | list[int] | None) -> Iterator[Conflict]:
    """Yield conflicts for an empty list, and for repeated and empty entries."""
    if items == []:
        yield Conflict(key, "an empty list", "remove it")
    for index, item in enumerate(items or []):
        if item == "":
            yield Conflict(f"{key}[{index}]", "an empty name", "remove it")
        elif item in (items or [])[:index]:
            yield Conflict(f"{key}[{index}]", f"'{shorten(str(item))}' is listed twice", "keep one")


def check_patterns(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for invalid regexes over module names, except target_modules."""
    spec = recipe.adapter
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(spec, key) == {}:
            yield Conflict(f"adapter.{key}", "an empty section", "remove it")
        for pattern in getattr(spec, key) or ():
            yield from _check_regex(f"adapter.{key}", pattern)
    if isinstance(spec.exclude_modules, list):
        yield from check_list("adapter.exclude_modules", spec.exclude_modules)
    elif spec.exclude_modules is not None:
        yield from _check_regex("adapter.exclude_modules", spec.exclude_modules)


def _check_regex(key: str, pattern: str) -> Iterator[Conflict]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fix = "correct it, or write a list of names"
        yield Conflict(key, f"'{shorten(pattern)}' is not a valid regex ({error})", fix)


def check_target_modules(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for targets that are wrong for any model; `model/target_modules.py` checks them on the model."""
    key = "adapter.target_modules"
    targets = recipe.adapter.target_modules
    if targets is None:
        return
    if isinstance(targets, list):
        if not targets:
            yield Conflict(key, "an empty list matches no layer", "list module names, or write all-linear")
        for index, name in enumerate(targets):
            if not name:
                yield Conflict(f"{key}[{index}]", "an empty name", "remove it")
            elif name in targets[:index]:
                yield Conflict(f"{key}[{index}]", f"'{shorten(name)}' is listed twice", "keep one")
            elif _means_all_linear(name):
                fix = "write target_modules: all-linear, without the list"
                yield Conflict(f"{key}[{index}]", f"'{shorten(name)}' in a list is read as a module name", fix)
        return
    if targets == "all-linear":
        return
    if not targets:
        yield Conflict(key, "an empty string matches no layer", "list module names, or write all-linear")
        return
    names = [name.strip() for name in targets.split(",")]
    if _means_all_linear(targets):
        yield Conflict(key, f"'{shorten(targets)}' is not a module name", "did you mean all-linear?")
    elif all(re.fullmatch(r"\w+", name) for name in names):
        message = f"'{shorten(targets)}' is read as a regex over full module names, and matches none"
        yield Conflict(key, message, f"write a list: [{shorten(', '.join(names))}]")
    else:
        yield from _check_regex(key, targets)


def _means_all_linear(name: str) -> bool:
    return name.lower().replace("_", "-") in ("all", "all-linear", "alllinear", "linear", "auto")
