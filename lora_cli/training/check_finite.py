"""Find NaN and infinity in tensors that are about to be saved: adapter weights and optimizer moments."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that has a NaN or an infinity, with what it has; None if all are finite.

    The largest absolute value of all tensors of a device is NaN or infinite if one of them is: the host waits once for
    each device, and only if there is something to find, for single tensors. Tensors of integers are passed over.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    for tensor in floats.values():
        by_device.setdefault(tensor.device, []).append(tensor)
    largest = [nn.utils.get_total_norm(each, norm_type=math.inf) for each in by_device.values()]
    if all(math.isfinite(float(value)) for value in largest):
        return None
    for name, tensor in floats.items():
        if not bool(tensor.isfinite().all()):
            return f"{name} has {'NaN' if bool(tensor.isnan().any()) else 'an infinity'}"
    return None
