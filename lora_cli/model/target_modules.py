"""Which layers the adapter goes on: resolved against the model, counted, and refused where something does not match."""

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
from lora_cli.recipe.problem import shorten
from lora_cli.recipe.schema import AdapterSpec

ALL_LINEAR = "all-linear"
MAX_LISTED = 12  # kinds of layers that a message names


class Coverage(NamedTuple):
    """One kind of linear layer and how much of it carries the adapter."""

    kind: str  # last part of the layer's name: q_proj, ...
    matched: int  # layers of this kind with the adapter
    layers: int  # layers of this kind
    parameters: int  # trainable, in all of them


class Targets(NamedTuple):
    """`target_modules`, `target_parameters` and `trainable_token_indices` as PEFT takes them."""

    modules: str | list[str]
    parameters: tuple[str, ...] = ()  # stacked weights of experts, which are no modules
    tokens: list[int] | dict[str, list[int]] | None = None  # of the embeddings, or of each module by name


def linear_layers(model: PreTrainedModel, heads: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Every linear layer by full name: PEFT's `all-linear`. The output head is left out, and so are `heads`."""
    head = model.get_output_embeddings()
    whole = tuple(heads)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, GgufLinear))
        and module is not head
        and not _within(name, whole)
        and not isinstance(module, ModulesToSaveWrapper)
    }


def resolve_target_modules(model: PreTrainedModel, spec: AdapterSpec, *, heads: Sequence[str] = ()) -> Targets:
    """The recipe's `target_modules` as PEFT takes them, once every name has been seen to match, and everywhere.

    Args:
        model: the base, without any adapter.
        spec: what is wanted.
        heads: modules that are trained whole, and so carry no adapter.

    Raises:
        LoraError: a name or regex that matches no layer, or that matches only some of the layers that are alike
            without `layers` saying so; the message lists the linear layers there are.
    """
    linear, experts = linear_layers(model, heads), expert_parameters(model)
    listed = f"its linear layers are: {_kinds([*linear, *experts])}"
    wanted = spec.target_modules
    assert wanted is not None, "a method with targets has a default for them"
    if wanted == ALL_LINEAR:
        names = [*linear, *experts]
        if not names:
            raise LoraError("adapter.target_modules: this model has no linear layers", hint="list its modules by name")
        packed = any(isinstance(layer, GgufLinear) for layer in linear.values())
        # PEFT's own word keeps adapter_config.json short, but it does not know layers that stay packed, and finds
        # those inside of modules that are trained whole.
        hidden = len(linear_layers(model)) > len(linear)
        if spec.layers is None and spec.exclude_modules is None and not packed and not hidden:
            return Targets(ALL_LINEAR)
        return _explicit(_selected(spec, names, listed), experts)
    names = [name for name, _ in model.named_modules() if name and not _within(name, heads)] + experts
    candidates = _selected(spec, names, listed)
    regex = _is_regex(wanted)
    matched = {entry: _matching(entry, candidates, regex=regex) for entry in _entries(wanted)}
    if missing := [entry for entry, found in matched.items() if not found]:
        raise _no_match(missing, linear, regex=regex, hint=listed)
    found = [name for name in candidates if any(name in hits for hits in matched.values())]
    _refuse_partial(found, [name for name in candidates if name in linear or name in experts], listed)
    inside = [name for name, _ in model.named_modules() if name and _within(name, heads)]
    inside = [name for entry in _entries(wanted) for name in _matching(entry, inside, regex=regex)]
    if spec.layers is not None or spec.exclude_modules is not None or inside or any(name in experts for name in found):
        return _explicit(found, experts)
    return Targets(wanted if isinstance(wanted, str) and regex else list(matched))


def describe_linear_layers(model: PreTrainedModel) -> str:
    """The kinds of linear layers that the model has, for the user."""
    return f"its linear layers are: {_kinds([*linear_layers(model), *expert_parameters(model)])}"


def _entries(wanted: str | Sequence[str]) -> Sequence[str]:
    return [wanted] if isinstance(wanted, str) else wanted


def _explicit(names: Sequence[str], experts: Sequence[str]) -> Targets:
    """Every layer by its full name, which says the same to each of PEFT's methods."""
    return Targets([n for n in names if n not in experts], tuple(n for n in names if n in experts))


def _selected(spec: AdapterSpec, names: Sequence[str], hint: str) -> list[str]:
    kept = _excluding(spec.exclude_modules, names, hint=hint)
    if spec.layers is not None:
        kept = _in_layers(spec.layers, kept)
    if not kept:
        raise LoraError("adapter.exclude_modules: every layer is excluded", hint=hint)
    return kept


def resolve_trainable_tokens(
    model: PreTrainedModel, ids: list[int], *, whole: Sequence[str]
) -> list[int] | dict[str, list[int]] | None:
    """Where the tokens `ids` are trained: in the embeddings, and in the output head where that has rows of its own and
    is not among the modules that are trained `whole`.

    Raises:
        LoraError: the head adds a bias, which PEFT leaves out where it trains rows of a head.
    """
    if not ids:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if own := [name for name, module in model.named_modules() if module is embeddings and name in whole]:
        raise LoraError(
            f"adapter.trainable_tokens: {own[0]} is trained whole already, by adapter.modules_to_save",
            hint="keep one of the two",
        )
    if head is None or head.weight is embeddings.weight:
        return ids  # PEFT keeps a tied head with the embeddings
    names = {id(module): name for name, module in model.named_modules()}
    if names[id(head)] in whole:
        return {names[id(embeddings)]: ids}
    if getattr(head, "bias", None) is not None:
        raise LoraError(
            f"adapter.trainable_tokens: {names[id(head)]} has a bias, which PEFT would leave out of its trained rows",
            hint=f"train both whole: adapter.modules_to_save: [{names[id(embeddings)]}, {names[id(head)]}]",
        )
    return {names[id(embeddings)]: ids, names[id(head)]: ids}


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Parameters that hold the weights of all experts of a layer, by full name."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 2 and "experts" in name]


def _is_regex(wanted: str | Sequence[str]) -> bool:
    return isinstance(wanted, str) and not wanted.isidentifier()


def _matching(entry: str, names: Iterable[str], *, regex: bool) -> list[str]:
    """The names that PEFT would take for `entry`: a regex matches whole names, a name also ends of them."""
    if regex:
        return [name for name in names if re.fullmatch(entry, name)]
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _no_match(missing: list[str], linear: Mapping[str, nn.Module], *, regex: bool, hint: str) -> LoraError:
    if regex:
        # PEFT matches a regex against the whole name.
        return LoraError(f"adapter.target_modules: the regex {missing[0]!r} matches no layer", hint=hint)
    kinds = {name.rpartition(".")[2] for name in linear}
    near = [m for w in missing for m in difflib.get_close_matches(w, kinds, n=1)]
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return LoraError(
        f"adapter.target_modules: {', '.join(missing)} match{'es' if len(missing) == 1 else ''} no layer",
        hint=meant + hint,
    )


def _refuse_partial(found: Sequence[str], candidates: Sequence[str], listed: str) -> None:
    """Layers that are alike but for their numbers are adapted all, or by `layers`."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in candidates:
        alike[_template(name)].append(name)
    for template, group in alike.items():
        hit = [name for name in group if name in found]
        if hit and len(hit) < len(group):
            numbers = sorted({number for name in hit if (number := layer_index(name)) is not None})
            raise LoraError(
                f"adapter.target_modules: only {len(hit)} of the {len(group)} layers {template} match",
                hint=f"to adapt some layers only, write adapter.layers: {numbers} and the kinds by name; {listed}",
            )


def _excluding(excluded: str | Sequence[str] | None, names: Iterable[str], *, hint: str) -> list[str]:
    kept = list(names)
    for entry in _entries(excluded or []):
        gone = set(_matching(entry, kept, regex=_is_regex(excluded or [])))
        if not gone:
            raise LoraError(f"adapter.exclude_modules: {shorten(entry)} matches no layer", hint=hint)
        kept = [name for name in kept if name not in gone]
    return kept


def _in_layers(numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    there = {number for name in names if (number := layer_index(name)) is not None}
    if missing := [number for number in numbers if number not in there]:
        last = max(there, default=-1)
        raise LoraError(
            f"adapter.layers: {', '.join(map(str, missing))}, but the model has "
            + (f"layers 0 to {last}" if there else "no numbered layers"),
            hint="write the numbers of layers that it has, or remove the key",
        )
    return [name for name in names if layer_index(name) in numbers]


def layer_index(name: str) -> int | None:
    """The number of the layer that a module belongs to: 3 for `model.layers.3.mlp.experts.0.up_proj`."""
    found = re.search(r"\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def _template(name: str) -> str:
    """`model.layers.*.mlp.up_proj`: what the names of layers that are alike have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _kinds(linear: Iterable[str]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    return ", ".join(kinds[:MAX_LISTED]) + (f" and {len(kinds) - MAX_LISTED} more" if len(kinds) > MAX_LISTED else "")


def check_patterns(spec: AdapterSpec, adapted: Iterable[str]) -> None:
    """Every key of rank_pattern and alpha_pattern has to match a layer with the adapter, by PEFT's rule.

    Raises:
        LoraError: one does not; PEFT would ignore it.
    """
    names = list(adapted)
    for field in ("rank_pattern", "alpha_pattern"):
        left = names
        for pattern in getattr(spec, field) or ():
            matched = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
            if not matched:
                raise LoraError(
                    f"adapter.{field}: {shorten(pattern)} matches no layer that carries the adapter",
                    hint=f"those are: {_kinds(names)}",
                )
            if not set(matched) & set(left):  # the first that matches a layer counts
                raise LoraError(
                    f"adapter.{field}: {shorten(pattern)} matches only layers that entries before it have matched",
                    hint="write the narrower entry first",
                )
            left = [name for name in left if name not in matched]


def find_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` means.

    Raises:
        LoraError: there is no such module.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for entry in wanted:
        hits = _matching(entry, names, regex=False)
        if not hits:
            tops = sorted({name.partition(".")[0] for name in names} | {name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(entry, tops, n=1)
            raise LoraError(
                f"adapter.modules_to_save: the model has no module {shorten(entry)}",
                hint=f"did you mean {near[0]}?" if near else f"its parts are: {', '.join(_parts(model))}",
            )
        found += hits
    for name in found:
        if outer := next((other for other in found if name.startswith(f"{other}.")), None):
            raise LoraError(
                f"adapter.modules_to_save: {name} lies within {outer}, which is trained whole already",
                hint="keep one of the two",
            )
    return found


def _parts(model: PreTrainedModel) -> list[str]:
    inner = [name for name, _ in model.base_model.named_children()] if model.base_model is not model else []
    return [*inner, *(name for name, _ in model.named_children())]


def coverage(layers: Mapping[str, nn.Module], adapted: Mapping[str, int]) -> list[Coverage]:
    """Per kind of layer, how many of `layers` are in `adapted` (full name → trainable parameters), largest first."""
    total = Counter(name.rpartition(".")[2] for name in layers)
    matched = Counter(name.rpartition(".")[2] for name in adapted)
    parameters: Counter[str] = Counter()
    for name, count in adapted.items():
        parameters[name.rpartition(".")[2]] += count
    kinds = sorted(total | matched, key=lambda kind: (-parameters[kind], kind))
    return [Coverage(kind, matched[kind], max(total[kind], matched[kind]), parameters[kind]) for kind in kinds]
