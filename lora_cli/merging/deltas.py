"""What an adapter changes in its base: which parameters, and how each new one comes about."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lora_cli.model.empty_base import EmptyModel


class LowRankDelta(NamedTuple):
    """ΔW = left @ right, in fp32: any rows of it can be had without the others."""

    left: Tensor  # [rows, rank], scale included
    right: Tensor  # [rank, columns]


class AdaptedLayer(NamedTuple):
    """A module of the base, and the layers of PEFT that stand over it."""

    name: str  # of the module, in the base
    module: nn.Module
    keys: tuple[str, ...]  # its parameters, by their names in it
    brought: frozenset[str]  # those of them that come with the adapter, and are in the module already
    tuners: tuple[BaseTunerLayer, ...]  # inner ones last; none where the module only grows

    def full(self, key: str) -> str:
        """A parameter's name in the base."""
        return f"{self.name}.{key}" if self.name else key


class Deltas(NamedTuple):
    """All that differs between the base and base with adapter."""

    layers: tuple[AdaptedLayer, ...]
    replaced: dict[str, Tensor]  # parameters and buffers that the adapter brings whole, by their names in the base
    together: frozenset[str]  # parameters that the adapter changes just as those that they are tied to


def find_deltas(empty: EmptyModel) -> Deltas:
    """Walk through the adapted model, and list what the adapter changes."""
    layers: list[AdaptedLayer] = []
    replaced: dict[str, Tensor] = {}
    together: set[str] = set()
    ensured = bool(getattr(empty.model.active_peft_config, "ensure_weight_tying", False))
    for name, module in _peft_modules(empty.model.get_base_model(), ""):
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.modules_to_save[module.active_adapters[0]]
            found = {f"{name}.{key}": value for key, value in whole.state_dict().items()}
            replaced |= found
            together |= found.keys() if ensured else set()
        elif isinstance(module, TrainableTokensWrapper):
            layers.append(_adapted_layer(name, module.token_adapter, empty.given))
            if module.token_adapter.tied_adapter is not None:
                together |= {layers[-1].full(key) for key in layers[-1].keys}
        elif isinstance(module, BaseTunerLayer):
            layers.append(_adapted_layer(name, module, empty.given))
            together |= {layers[-1].full(key) for key in layers[-1].keys} if ensured else set()
    in_layers = {layer.full(key) for layer in layers for key in layer.keys}
    for name, parameter in empty.model.get_base_model().named_parameters(remove_duplicate=False):
        if name in empty.given - in_layers:
            replaced[name] = parameter.data
    return Deltas(tuple(layers), replaced, frozenset(together))


def _peft_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of PEFT's, with their names in the base."""
    if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper, BaseTunerLayer)):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _peft_modules(inner, f"{name}.{child}" if name else child)


def _adapted_layer(name: str, outer: BaseTunerLayer, given: frozenset[str]) -> AdaptedLayer:
    tuners: list[BaseTunerLayer] = []
    module: Any = outer
    while isinstance(module, BaseTunerLayer):
        tuners.append(module)
        module = module.base_layer
    keys = tuple(key for key, _ in module.named_parameters(recurse=False))
    return AdaptedLayer(name, module, keys, frozenset(key for key in keys if f"{name}.{key}" in given), tuple(tuners))


def merged_parameters(model: PeftModel) -> dict[str, Tensor]:
    """Every parameter of the base as PEFT merges it, by its name in the base; `model` is merged afterwards.

    PEFT's `merge_and_unload` does the same, but for some methods cannot put a module trained whole back in its place.
    """
    found: dict[str, Tensor] = {}
    wrapped: list[str] = []
    for name, module in _peft_modules(model.get_base_model(), ""):
        wrapped.append(f"{name}.")
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.modules_to_save[module.active_adapters[0]]
            found |= {f"{name}.{key}": value.data for key, value in whole.named_parameters()}
            continue
        layer = _adapted_layer(name, getattr(module, "token_adapter", module), frozenset())
        merge_by_peft(layer)
        found |= {layer.full(key): layer.module.get_parameter(key).data for key in layer.keys}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        if not name.startswith(tuple(wrapped)):
            found[name] = parameter.data
    return found


def low_rank_delta(layer: AdaptedLayer) -> LowRankDelta | None:
    """The factors of a layer whose weight is changed by plain LoRA, and nothing else; None for all others."""
    if len(layer.tuners) != 1 or "weight" in layer.brought:
        return None
    tuner = layer.tuners[0]
    if type(tuner) not in (LoraLinear, LoraEmbedding):
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
    if tuner.fan_in_fan_out:  # Conv1D keeps its weight transposed
        return LowRankDelta(a.T.contiguous() * scale, b.T.contiguous())
    return LowRankDelta(b * scale, a)


@torch.no_grad()
def merge_by_peft(layer: AdaptedLayer) -> None:
    """Merge what stands over a module into the weights that it was filled with, by PEFT's own arithmetic.

    Raises:
        ValueError: a merged weight that is not finite.
    """
    for tuner in reversed(layer.tuners):
        tuner.merge(safe_merge=True)
