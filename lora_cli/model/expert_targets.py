"""Experts and routers as targets of an adapter: which names they have, and which PEFT and a method can adapt.

PEFT adapts a stacked expert weight by `target_parameters`. For families whose experts were linear layers in
transformers 4, it also reads some names in `target_modules` as experts: linear layers of these names cannot be adapted.
"""

from collections.abc import Iterable, Sequence, Set
from typing import Any

from peft import PeftModel
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_FUSED_TARGETS,
    _MOE_TARGET_MODULE_MAPPING,
)
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import experts
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec

# Names of experts' layers in checkpoints and in transformers 4, and the parameter that transformers 5 stacks them in.
STACKED_IN = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}
HALVES = ({"gate_proj", "up_proj"}, {"w1", "w3"})  # both halves of gate_up_proj, which one adapter covers


def adaptable(model: PreTrainedModel, spec: AdapterSpec) -> tuple[list[str], list[str]]:
    """Return the names of expert weights and of router weights that the adapter's method can adapt.

    Both lists are empty if it adapts linear layers only. Routers that are linear layers are not listed.
    """
    if not METHOD_FACTS[spec.method].adapts_experts:
        return [], []
    names = [name for name in experts.router_names(model) if name.endswith(".weight")]
    return list(experts.expert_weights(model)), names


def expand_names(entries: Sequence[str], names: Sequence[str], layers: Iterable[str] = ()) -> list[str]:
    """Return the entries of target_modules with other names of expert weights replaced by those of the model.

    `experts` stands for all expert weights, `gate` or `router` for a router's weight, and the names that experts have
    in a checkpoint for the parameter that they are stacked in. The names of linear layers stay in the list.

    Args:
        entries: of target_modules.
        names: of the expert and router weights that can be adapted.
        layers: names of the linear layers.

    Raises:
        LoraError: one half of a stacked weight is listed without the other.
    """
    kinds = {name.rpartition(".")[2] for name in names}
    layers = list(layers)
    expanded: list[str] = []
    for entry in entries:
        stacked = STACKED_IN.get(entry)
        owners = [name for name in names if _ends_with(name.rpartition(".")[0], entry)]
        is_layer = any(_ends_with(name, entry) for name in layers)
        if is_layer or not (owners or stacked in kinds):
            expanded.append(entry)
        expanded += owners
        if stacked in kinds and entry not in kinds:
            missing = next(({*half} - {*entries} for half in HALVES if entry in half), set())
            if missing and not is_layer:
                raise LoraError(
                    f"adapter.target_modules: {entry} and {' '.join(missing)} of the experts are one weight, {stacked}",
                    hint=f"list both, or write {stacked}",
                )
            expanded += [] if missing else [stacked]
    return list(dict.fromkeys(expanded))


def check_method(entries: Sequence[str], model: PreTrainedModel, spec: AdapterSpec, layers: Iterable[str]) -> None:
    """Raise if an entry of target_modules names only experts, and the method adapts linear layers only.

    Raises:
        LoraError: so.
    """
    if METHOD_FACTS[spec.method].adapts_experts:
        return
    layers, weights = list(layers), list(experts.expert_weights(model))
    for entry in entries:
        named = any(_ends_with(name, entry) or _ends_with(name.rpartition(".")[0], entry) for name in weights)
        if named and not any(_ends_with(name, entry) for name in layers):
            methods = [name for name, facts in METHOD_FACTS.items() if facts.adapts_experts]
            raise LoraError(
                f"adapter.target_modules: {entry} is a weight of experts, and {spec.method} adapts linear layers only",
                hint=f"leave it out, or choose one of the methods that adapt experts: {', '.join(methods)}",
            )


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def misread_names(model: PreTrainedModel, spec: AdapterSpec) -> frozenset[str]:
    """Return the last parts of names that PEFT reads as experts of this model, wherever they stand."""
    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", ""))
    if not METHOD_FACTS[spec.method].lora_config or not _MOE_FUSED_TARGETS.get(kind):
        return frozenset()
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ()))


def without_misread(names: Iterable[str], parameters: Sequence[str], misread: Set[str]) -> list[str]:
    """Return the names of targets that PEFT does not misread; it misreads layers, and no full names of parameters.

    Raises:
        LoraError: no name is left.
    """
    names = list(names)
    left = [name for name in names if name in parameters or name.rpartition(".")[2] not in misread]
    if not left:
        raise LoraError(
            f"adapter.target_modules: PEFT reads {names[0].rpartition('.')[2]} as a name of experts in this family, "
            "and cannot adapt linear layers of this name",
            hint="add other layers, such as q_proj and v_proj",
        )
    return left


def expert_dropout(spec: AdapterSpec) -> float:
    """Return the dropout of an adapter on experts, which is always 0.

    Raises:
        LoraError: the recipe asks for another one than the default.
    """
    if spec.dropout and spec.dropout != METHOD_FACTS[spec.method].options["dropout"]:
        raise LoraError(
            f"adapter.dropout: {spec.dropout:g}, but PEFT has no dropout for the stacked weights of experts",
            hint="set adapter.dropout: 0, or leave the experts out: adapter.exclude_modules: [experts]",
        )
    return 0.0


def describe_experts(model: PeftModel, spec: AdapterSpec) -> list[str]:
    """Return lines on what an adapter does not cover, or covers otherwise than requested, in a mixture of experts."""
    base: Any = model.get_base_model()
    config: Any = model.peft_config[model.active_adapter]
    weights = experts.expert_weights(base)
    lines = []
    if weights and not METHOD_FACTS[spec.method].adapts_experts:
        lines.append(f"  experts have no adapter: {spec.method} adapts linear layers only")
    if getattr(config, "target_parameters", None) and spec.dropout and not config.lora_dropout:
        lines.append(f"  dropout: 0 in place of the default {spec.dropout:g}, which PEFT does not support on experts")
    misread = sorted({name.rpartition(".")[2] for name in experts.linear_names(base)} & misread_names(base, spec))
    if misread:
        lines.append(
            f"  {', '.join(misread)} outside of experts have no adapter: PEFT reads these names as experts of "
            f"{base.config.model_type}"
        )
    return lines
