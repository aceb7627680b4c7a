"""Resolve target modules: which layers of the model get the adapter, with errors for names that do not match."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.utils import GgufLinear
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError
from lora_cli.model import expert_targets
from lora_cli.model.experts import expert_weights, routers
from lora_cli.model.multimodal import OutsideText, is_inside, outside_text
from lora_cli.recipe.problem import shorten
from lora_cli.recipe.schema import AdapterSpec

ALL_LINEAR = "all-linear"
MAX_LISTED = 12  # kinds of layers that a message lists


# Kinds of layers, by model_type, that the model or its kernels bypass: they multiply with the weight themselves, and an
# adapter on the layer would never be used. all-linear leaves them out.
BYPASSED: dict[str, frozenset[str]] = {
    "mamba": frozenset({"dt_proj", "out_proj"}),
    "falcon_mamba": frozenset({"dt_proj", "out_proj"}),
    "jamba": frozenset({"dt_proj"}),
    "mamba2": frozenset({"out_proj"}),
    "falcon_h1": frozenset({"out_proj"}),
    "nemotron_h": frozenset({"out_proj"}),
}


class Coverage(NamedTuple):
    """One kind of linear layer, and how many of these layers have an adapter."""

    kind: str  # last part of the layer's name: q_proj, ...
    matched: int  # layers of this kind with an adapter
    layers: int  # layers of this kind
    parameters: int  # trainable ones in all of them
    experts: int = 0  # experts that one of these layers stacks; 0 for other layers


class Targets(NamedTuple):
    """PEFT's `target_modules`, `target_parameters` and `trainable_token_indices`."""

    modules: str | list[str]
    parameters: tuple[str, ...] = ()  # stacked weights of MoE experts, which are not modules
    tokens: list[int] | dict[str, list[int]] | None = None  # ids for the embeddings, or for each module by name


def linear_layers(model: PreTrainedModel, heads: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Return the linear layers by full name, without the output head, `heads`, and the routers of experts."""
    head = model.get_output_embeddings()
    excluded = (*heads, *routers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, GgufLinear))
        and module is not head
        and not is_inside(name, excluded)
        and not isinstance(module, ModulesToSaveWrapper)
    }


def bypassed_layers(model: PreTrainedModel, layers: Iterable[str]) -> list[str]:
    """Return those of `layers`, full names, whose weights the model multiplies with without calling the layer."""
    kinds = BYPASSED.get(model.config.get_text_config().model_type, frozenset())
    return [name for name in layers if name.rpartition(".")[2] in kinds]


def resolve_target_modules(model: PreTrainedModel, spec: AdapterSpec, *, heads: Sequence[str] = ()) -> Targets:
    """Return the recipe's `target_modules` in PEFT's form, after checking that every name matches.

    Args:
        model: the base, without an adapter.
        spec: the recipe's adapter section.
        heads: fully trained modules, which get no adapter.

    Modules of a multimodal model that text does not pass through get no adapter either.

    Raises:
        LoraError: a name or regex matches no layer, only layers that text does not pass through, or without `layers`
            only some of the layers whose names differ only in their numbers. The hint lists the model's linear layers.
    """
    outside = outside_text(model)
    towers = [part.name for part in outside]
    inside_towers = [name for name, _ in model.named_modules() if is_inside(name, towers)]
    heads = [*heads, *towers]
    linear = linear_layers(model, heads)
    experts, router_weights = (
        [name for name in names if not is_inside(name, heads)] for names in expert_targets.adaptable(model, spec)
    )
    parameters = [*experts, *router_weights]
    layer_hint = f"its linear layers are: {_kinds([*linear, *parameters])}"
    requested = spec.target_modules
    assert requested is not None, "a method with targets has a default for them"
    narrowed = spec.layers is not None or spec.exclude_modules is not None
    # By the names alone, PEFT leaves out the experts of some families, and adapts the routers of others.
    misread = expert_targets.misread_names(model, spec)
    moe = bool(expert_weights(model) or misread)
    if requested == ALL_LINEAR:
        bypassed = bypassed_layers(model, linear)
        names = [name for name in (*linear, *experts) if name not in bypassed]
        if not names:
            raise LoraError("adapter.target_modules: this model has no linear layers", hint="list its modules by name")
        packed = any(isinstance(layer, GgufLinear) for layer in linear.values())
        # The keyword all-linear keeps adapter_config.json short. But PEFT does not expand it to packed layers, and
        # expands it to linear layers inside fully trained modules too.
        linear_inside_heads = len(linear_layers(model)) > len(linear)
        if not (narrowed or packed or linear_inside_heads or moe or bypassed):
            return Targets(ALL_LINEAR)
        selected = _select(spec, names, parameters, layer_hint, [*inside_towers, *bypassed])
        return _by_full_name(expert_targets.without_misread(selected, parameters, misread), parameters)
    modules = [name for name, _ in model.named_modules() if name and not is_inside(name, heads)]
    names = [name for name in modules if f"{name}.weight" not in router_weights] + parameters
    candidates = _select(spec, names, parameters, layer_hint, inside_towers)
    regex = _is_regex(requested)
    entries = _entries(requested)
    if not regex:
        expert_targets.check_method(entries, model, spec, linear)
        entries = expert_targets.expand_names(entries, parameters, linear)
    matches = {entry: _matching(entry, candidates, regex=regex) for entry in entries}
    if unmatched := [entry for entry, names_of_entry in matches.items() if not names_of_entry]:
        _check_inside_text(unmatched, model, outside, regex=regex, hint=layer_hint)
        raise _no_match(unmatched, linear, regex=regex, hint=layer_hint)
    matched = [name for name in candidates if any(name in names_of_entry for names_of_entry in matches.values())]
    if bypassed := bypassed_layers(model, matched):
        kind = bypassed[0].rpartition(".")[2]
        raise LoraError(
            f"adapter.target_modules: {kind} of a {model.config.model_type} model cannot have an adapter: the model "
            "multiplies with its weight itself",
            hint=f"remove it, or leave it out: adapter.exclude_modules: [{kind}]",
        )
    if spec.source is None:  # an adapter that training goes on from may list the layers that `layers` selected
        _check_all_layers_match(matched, [name for name in candidates if name in linear or name in experts], layer_hint)
    inside_heads = [name for name, _ in model.named_modules() if name and is_inside(name, heads)]
    ambiguous = any(_matching(entry, inside_heads, regex=regex) for entry in entries)
    if narrowed or ambiguous or moe:
        return _by_full_name(expert_targets.without_misread(matched, parameters, misread), parameters)
    return Targets(requested if isinstance(requested, str) and regex else list(matches))


def describe_linear_layers(model: PreTrainedModel) -> str:
    """Return a hint that lists the kinds of linear layers of the model."""
    return f"its linear layers are: {_kinds([*linear_layers(model), *expert_weights(model)])}"


def _entries(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _by_full_name(names: Sequence[str], parameters: Sequence[str]) -> Targets:
    """Return targets that list every layer by its full name, which all of PEFT's methods match in the same way."""
    return Targets([n for n in names if n not in parameters], tuple(n for n in names if n in parameters))


def _check_inside_text(
    entries: Sequence[str], model: PreTrainedModel, outside: Sequence[OutsideText], *, regex: bool, hint: str
) -> None:
    """Raise a LoraError if one of `entries` matches modules that text does not pass through."""
    for part in outside:
        inside = [name for name, _ in model.named_modules() if is_inside(name, [part.name])]
        if reached := [entry for entry in entries if _matching(entry, inside, regex=regex)]:
            raise LoraError(
                f"adapter.target_modules: {shorten(reached[0])} matches only layers of {part.name}, the {part.kind}: "
                "text does not pass through it",
                hint=hint,
            )


def _select(
    spec: AdapterSpec, names: Sequence[str], parameters: Sequence[str], hint: str, outside: Sequence[str]
) -> list[str]:
    """Return the `names` that `exclude_modules` and `layers` leave.

    `parameters` are those of experts and routers; the names `outside` are left out already.
    """
    excluded = spec.exclude_modules
    if isinstance(excluded, list):
        excluded = expert_targets.expand_names(excluded, parameters)
    selected = _exclude(excluded, names, hint=hint, outside=outside)
    if spec.layers is not None:
        selected = _in_layers(spec.layers, selected)
    if not selected:
        raise LoraError("adapter.exclude_modules: every layer is excluded", hint=hint)
    return selected


def resolve_trainable_tokens(
    model: PreTrainedModel, ids: list[int], *, modules_to_save: Sequence[str]
) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for the token ids `ids`.

    The tokens are trained in the embeddings, and in the output head too if it is neither tied to the embeddings nor one
    of `modules_to_save`, which are fully trained.

    Raises:
        LoraError: the embeddings are fully trained already, or the head has a bias, which PEFT ignores when it trains
            single rows of a head.
    """
    if not ids:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if saved := [name for name, module in model.named_modules() if module is embeddings and name in modules_to_save]:
        raise LoraError(
            f"adapter.trainable_tokens: {saved[0]} is already fully trained by adapter.modules_to_save",
            hint="keep one of the two",
        )
    if head is None or head.weight is embeddings.weight:
        return ids  # PEFT trains a tied head together with the embeddings
    names = {id(module): name for name, module in model.named_modules()}
    if names[id(head)] in modules_to_save:
        return {names[id(embeddings)]: ids}
    if getattr(head, "bias", None) is not None:
        raise LoraError(
            f"adapter.trainable_tokens: {names[id(head)]} has a bias, which PEFT ignores when it trains single rows",
            hint=f"train both fully: adapter.modules_to_save: [{names[id(embeddings)]}, {names[id(head)]}]",
        )
    return {names[id(embeddings)]: ids, names[id(head)]: ids}


def _is_regex(patterns: str | Sequence[str]) -> bool:
    return isinstance(patterns, str) and not patterns.isidentifier()


def _matching(entry: str, names: Iterable[str], *, regex: bool) -> list[str]:
    """Return the names that PEFT matches with `entry`: a regex matches full names, a name also their last parts."""
    if regex:
        return [name for name in names if re.fullmatch(entry, name)]
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _no_match(unmatched: list[str], linear: Mapping[str, nn.Module], *, regex: bool, hint: str) -> LoraError:
    if regex:
        # PEFT matches a regex against the full name.
        return LoraError(f"adapter.target_modules: the regex {unmatched[0]!r} matches no layer", hint=hint)
    kinds = {name.rpartition(".")[2] for name in linear}
    similar = [kind for entry in unmatched for kind in difflib.get_close_matches(entry, kinds, n=1)]
    suggestion = f"did you mean {', '.join(similar)}? " if similar else ""
    return LoraError(
        f"adapter.target_modules: {', '.join(unmatched)} match{'es' if len(unmatched) == 1 else ''} no layer",
        hint=suggestion + hint,
    )


def _check_all_layers_match(matched: Sequence[str], candidates: Sequence[str], layer_hint: str) -> None:
    """Raise a LoraError if only some of the layers that differ in their numbers alone are matched."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in candidates:
        groups[_template(name)].append(name)
    for template, group in groups.items():
        hits = [name for name in group if name in matched]
        if hits and len(hits) < len(group):
            numbers = sorted({number for name in hits if (number := layer_index(name)) is not None})
            raise LoraError(
                f"adapter.target_modules: only {len(hits)} of the {len(group)} layers {template} match",
                hint=f"to adapt only some layers, set adapter.layers: {numbers} and target_modules without numbers; "
                f"{layer_hint}",
            )


def _exclude(
    excluded: str | Sequence[str] | None, names: Iterable[str], *, hint: str, outside: Sequence[str]
) -> list[str]:
    remaining = list(names)
    for entry in _entries(excluded or []):
        removed = set(_matching(entry, remaining, regex=_is_regex(excluded or [])))
        if not removed and not _matching(entry, outside, regex=_is_regex(excluded or [])):
            raise LoraError(f"adapter.exclude_modules: {shorten(entry)} matches no layer", hint=hint)
        remaining = [name for name in remaining if name not in removed]
    return remaining


def _in_layers(numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    existing = {number for name in names if (number := layer_index(name)) is not None}
    if missing := [number for number in numbers if number not in existing]:
        last = max(existing, default=-1)
        raise LoraError(
            f"adapter.layers: {', '.join(map(str, missing))}, but the model has "
            + (f"layers 0 to {last}" if existing else "no numbered layers"),
            hint="use layer numbers that exist, or remove the key",
        )
    return [name for name in names if layer_index(name) in numbers]


def layer_index(name: str) -> int | None:
    """Return the number of the layer that a module belongs to, such as 3 for `model.layers.3.mlp.experts.0.up_proj`."""
    match = re.search(r"\.(\d+)(\.|$)", name)
    return int(match[1]) if match else None


def _template(name: str) -> str:
    """Return the name with its numbers replaced by *, such as `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _kinds(names: Iterable[str]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(kinds[:MAX_LISTED]) + (f" and {len(kinds) - MAX_LISTED} more" if len(kinds) > MAX_LISTED else "")


def check_patterns(spec: AdapterSpec, adapted: Iterable[str]) -> None:
    """Raise a LoraError unless every key of rank_pattern and alpha_pattern applies to a layer, by PEFT's rule.

    `adapted` are the full names of the layers with an adapter.

    Raises:
        LoraError: a key matches no such layer, or only layers that an earlier key matches; PEFT would ignore it.
    """
    names = list(adapted)
    for field in ("rank_pattern", "alpha_pattern"):
        remaining = names
        for pattern in getattr(spec, field) or ():
            matched = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
            if not matched:
                raise LoraError(
                    f"adapter.{field}: {shorten(pattern)} matches no layer with an adapter",
                    hint=f"the layers with an adapter are: {_kinds(names)}",
                )
            if not set(matched) & set(remaining):  # for each layer, the first key that matches applies
                raise LoraError(
                    f"adapter.{field}: {shorten(pattern)} matches only layers that earlier entries match",
                    hint="put the narrower entry first",
                )
            remaining = [name for name in remaining if name not in matched]


def find_modules(model: PreTrainedModel, modules_to_save: Sequence[str]) -> list[str]:
    """Return the full names of the modules that the entries of `modules_to_save` match.

    Raises:
        LoraError: an entry matches no module or one that text does not pass through, or a module is inside another one
            of the list.
    """
    names = [name for name, _ in model.named_modules() if name]
    outside = outside_text(model)
    modules: list[str] = []
    for entry in modules_to_save:
        matches = _matching(entry, names, regex=False)
        if not matches:
            known = sorted({name.partition(".")[0] for name in names} | {name.rpartition(".")[2] for name in names})
            similar = difflib.get_close_matches(entry, known, n=1)
            raise LoraError(
                f"adapter.modules_to_save: the model has no module {shorten(entry)}",
                hint=f"did you mean {similar[0]}?" if similar else f"its modules are: {', '.join(_children(model))}",
            )
        if part := next((part for part in outside for name in matches if is_inside(name, [part.name])), None):
            raise LoraError(
                f"adapter.modules_to_save: {shorten(entry)} is in {part.name}, the {part.kind}: "
                "text does not pass through it",
                hint=f"train modules of the decoder; a full name applies to one module, such as {names[-1]}",
            )
        modules += matches
    for name in modules:
        if outer := next((other for other in modules if name.startswith(f"{other}.")), None):
            raise LoraError(
                f"adapter.modules_to_save: {name} is inside {outer}, which is already fully trained",
                hint="keep one of the two",
            )
    return modules


def _children(model: PreTrainedModel) -> list[str]:
    """Return the names of the top modules of the model and of its base model."""
    inner = [name for name, _ in model.base_model.named_children()] if model.base_model is not model else []
    return [*inner, *(name for name, _ in model.named_children())]


def coverage(kinds: Mapping[str, str], adapted: Mapping[str, int], experts: Mapping[str, int]) -> list[Coverage]:
    """Count for each kind of layer how many layers have an adapter, most trainable parameters first.

    Args:
        kinds: the kind of each layer that could have an adapter, by full name.
        adapted: trainable parameters of each layer with an adapter, by full name.
        experts: number of experts of each stacked weight, by full name.
    """
    kinds = {**{name: name.rpartition(".")[2] for name in adapted}, **kinds}
    total, matched, parameters = Counter(kinds.values()), Counter(kinds[name] for name in adapted), Counter[str]()
    for name, count in adapted.items():
        parameters[kinds[name]] += count
    stacked = {kinds[name]: count for name, count in experts.items()}
    order = sorted(total, key=lambda kind: (-parameters[kind], kind))
    return [Coverage(kind, matched[kind], total[kind], parameters[kind], stacked.get(kind, 0)) for kind in order]
