"""Count what autograd saves in a forward pass of training."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Saved:
    """What autograd keeps in place of a tensor, as long as its node lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of the tensors that `forward` leaves saved, each storage once, without parameters and buffers.

    What it saved and has dropped again, as for a result that is detached, is not counted.
    """
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = forward()  # keeps the graph
    left = [holder.tensor.untyped_storage() for reference in saved if (holder := reference()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in left}
    del result
    return sum(size for address, size in sizes.items() if address not in known)
