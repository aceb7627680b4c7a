"""Fold every adapted layer's update into its base weight, in fp32, and measure what rounding leaves of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class Folded(NamedTuple):
    """One weight that an adapter changed."""

    name: str  # of the layer, in the base
    survived: float  # share of the update that is left after rounding to the dtype that is written: 1 is all


@torch.no_grad()
def fold(model: PeftModel, dtype: torch.dtype) -> Iterator[Folded]:
    """Merge layer by layer, by PEFT's own arithmetic of each method; the model must be in fp32, and stays so.

    The share is ⟨W'-W, ΔW⟩/⟨ΔW, ΔW⟩, with W' the merged weight rounded to `dtype` and W the base's, rounded likewise.

    Raises:
        ValueError: a merged weight that is not finite.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or name.endswith(".base_layer"):
            continue
        before = {key: weight.clone() for key, weight in _weights(layer)}
        layer.merge(safe_merge=True)
        for key, merged in _weights(layer):
            delta = merged - before[key]
            size = float(delta.double().square().sum())
            if size:
                kept = merged.to(dtype).double() - before[key].to(dtype).double()
                yield Folded(f"{name}.{key}", float((kept * delta.double()).sum()) / size)


def _weights(layer: Any) -> list[tuple[str, Tensor]]:
    """The floating weights of the base layer, biases and all."""
    base: nn.Module = layer.get_base_layer()
    return [(name, p.data) for name, p in base.named_parameters() if p.is_floating_point() and "lora_" not in name]
