"""A merge in memory: every parameter as PEFT merges it into the loaded base, and the comparison of a loaded model."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_cli.merging.deltas import find_deltas, merge_by_peft
from lora_cli.model.empty_base import EmptyModel


def merged_parameters(model: PeftModel) -> dict[str, Tensor]:
    """Merge `model` in place by PEFT, and return every parameter of the base by its name in the base.

    PEFT's `merge_and_unload` does the same, but fails for some methods on fully trained modules (`modules_to_save`).
    """
    deltas = find_deltas(EmptyModel(model, {}, frozenset(), ()))
    merged = dict(deltas.replaced)
    for layer in deltas.layers:
        merge_by_peft(layer)
        values = (layer.module.get_parameter(parameter).data for parameter in layer.parameter_names)
        merged |= dict(zip(layer.full_names(), values, strict=True))
    wrapped = tuple({f"{name.rpartition('.')[0]}." for name in merged})
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        if not name.startswith(wrapped):
            merged[name] = parameter.data
    return merged


class Difference(NamedTuple):
    """A parameter that differs from the expected one by more than rounding."""

    name: str
    error_ratio: float  # largest difference of an element, divided by the difference that rounding allows; above 1


@torch.no_grad()
def differences(
    written: nn.Module, expected: dict[str, Tensor], dtypes: dict[str, torch.dtype]
) -> Iterator[Difference]:
    """Yield the parameters of `written` that differ from `expected` by more than one rounding to their dtype.

    The tolerance is half a unit in the last place, plus 1e-5 of the largest weight for the order of summation.

    Args:
        written: the merged model, loaded back in fp32.
        expected: every parameter as PEFT merges it, fp32, by name.
        dtypes: dtype that each parameter is stored in, by name.
    """
    for name, parameter in written.named_parameters():
        value = expected[name]
        rounding = torch.finfo(dtypes.get(name, torch.float32)).eps / 2
        tolerance = value.abs() * (rounding * 1.01) + float(value.abs().max()) * 1e-5 + 1e-30
        error_ratio = float(((parameter - value).abs() / tolerance).max())
        if not error_ratio <= 1:
            yield Difference(name, error_ratio)
