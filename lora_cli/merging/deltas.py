"""Find what an adapter changes in its base: low-rank deltas (ΔW = BA), other PEFT layers, replaced parameters."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.fused_lora import FusedLora


class LowRankDelta(NamedTuple):
    """ΔW = left @ right, in fp32. Rows of it can be computed in blocks."""

    left: Tensor  # [rows, rank], scale included
    right: Tensor  # [rank, columns]


class AdaptedLayer(NamedTuple):
    """A module of the base, and the PEFT layers that wrap it."""

    name: str  # of the module, in the base
    module: nn.Module
    parameter_names: tuple[str, ...]  # of the module's own parameters, within the module
    from_adapter: frozenset[str]  # those whose values are in the adapter file; they are loaded already
    tuners: tuple[BaseTunerLayer, ...]  # outermost first; empty if the module only gets new rows

    def full_name(self, parameter: str) -> str:
        """Return the name in the base of a parameter of the module."""
        return f"{self.name}.{parameter}" if self.name else parameter

    def full_names(self) -> list[str]:
        """Return the names in the base of all parameters of the module."""
        return [self.full_name(parameter) for parameter in self.parameter_names]


class Deltas(NamedTuple):
    """All differences between the base and the base with the adapter."""

    layers: tuple[AdaptedLayer, ...]
    replaced: dict[str, Tensor]  # parameters and buffers that the adapter file contains in full, by name in the base
    changed_together: frozenset[str]  # tied parameters that the adapter changes in the same way as their tied partners


def find_deltas(empty: EmptyModel) -> Deltas:
    """Return the layers and tensors of the base that the adapter on `empty` changes, in the adapter's dtype (fp32)."""
    layers: list[AdaptedLayer] = []
    replaced: dict[str, Tensor] = {}
    changed_together: set[str] = set()
    keeps_ties = bool(getattr(empty.model.active_peft_config, "ensure_weight_tying", False))
    for name, module in _peft_modules(empty.model.get_base_model(), ""):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            tensors = {f"{name}.{key}": value for key, value in trained.state_dict().items()}
            replaced |= tensors
            changed_together |= tensors.keys() if keeps_ties else set()
        elif isinstance(module, TrainableTokensWrapper):
            layers.append(_adapted_layer(name, module.token_adapter, empty.from_adapter))
            if module.token_adapter.tied_adapter is not None:
                changed_together.update(layers[-1].full_names())
        elif isinstance(module, BaseTunerLayer):
            layers.append(_adapted_layer(name, module, empty.from_adapter))
            changed_together.update(layers[-1].full_names() if keeps_ties else ())
    in_layers = {full_name for layer in layers for full_name in layer.full_names()}
    for name, parameter in empty.model.get_base_model().named_parameters(remove_duplicate=False):
        if name in empty.from_adapter - in_layers:
            replaced[name] = parameter.data
    return Deltas(tuple(layers), replaced, frozenset(changed_together))


def _peft_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost PEFT modules with their names in the base."""
    if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper, BaseTunerLayer)):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _peft_modules(inner, f"{name}.{child}" if name else child)


def _adapted_layer(name: str, outer: BaseTunerLayer, from_adapter: frozenset[str]) -> AdaptedLayer:
    """Describe the module `name` of the base under the PEFT layer `outer`; `from_adapter` are names in the base.

    Raises:
        LoraError: the adapter has a bias where the base has none.
    """
    tuners: list[BaseTunerLayer] = []
    module: Any = outer
    while isinstance(module, BaseTunerLayer):
        tuners.append(module)
        module = module.base_layer
    names = tuple(parameter for parameter, _ in module.named_parameters(recurse=False))
    for tuner in tuners:
        has_bias = getattr(tuner, "lora_bias", {}).get(tuner.active_adapters[0], False)
        if has_bias and "bias" not in names:
            raise LoraError(
                f"the adapter has a bias for {name}, which has none in the base (lora_bias: true): it cannot be merged",
                hint="use the adapter with its base, as lora chat and lora eval do",
            )
    loaded = frozenset(parameter for parameter in names if f"{name}.{parameter}" in from_adapter)
    return AdaptedLayer(name, module, names, loaded, tuple(tuners))


def low_rank_delta(layer: AdaptedLayer) -> LowRankDelta | None:
    """Return the fp32 factors of a layer that only plain LoRA on its weight changes; None for all other layers."""
    if len(layer.tuners) != 1 or "weight" in layer.from_adapter:
        return None
    tuner = layer.tuners[0]
    if type(tuner) not in (LoraLinear, FusedLora, LoraEmbedding):
        return None
    assert isinstance(tuner, LoraLinear | LoraEmbedding)
    (adapter,) = tuner.active_adapters
    if adapter in tuner.lora_variant or tuner.lora_bias.get(adapter) or layer.module.get_parameter("weight").dim() != 2:
        return None
    scale: float = tuner.scaling[adapter]
    if isinstance(tuner, LoraEmbedding):
        # The embedding of token i is column i of BA.
        return LowRankDelta(tuner.lora_embedding_A[adapter].T * scale, tuner.lora_embedding_B[adapter].T.contiguous())
    a, b = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
    if tuner.fan_in_fan_out:  # Conv1D stores its weight transposed
        return LowRankDelta(a.T.contiguous() * scale, b.T.contiguous())
    return LowRankDelta(b * scale, a)


@torch.no_grad()
def merge_by_peft(layer: AdaptedLayer) -> None:
    """Merge the PEFT layers of `layer` into its module's weights, with PEFT's own `merge`.

    Raises:
        ValueError: a merged weight is not finite.
    """
    for tuner in reversed(layer.tuners):
        tuner.merge(safe_merge=True)
