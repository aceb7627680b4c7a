"""The meta device in the part of a GPU, on a machine that has none: what stays on the CPU raises, waits are counted.

torch's meta tensors have shapes but no data. Within `GpuPart`, an operation on tensors of both devices raises as on a
GPU, and each point at which the host would wait for the GPU is counted; there the host reads ones.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

META, CPU = torch.device("meta"), torch.device("cpu")
PROJECT = Path(__file__).resolve().parents[2] / "lora_cli"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# bitsandbytes makes this table once a process, on the device of the first weight that it quantizes: a meta tensor would
# be without values in all later tests.
functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}


class GpuPart(TorchDispatchMode):
    """Have meta tensors behave as a GPU's towards the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # by the line of lora_cli that caused them
        self.slow_copies: list[tuple[int, ...]] = []  # shapes of what was copied to the device while the host waited

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_meta = [tensor for tensor in tensors if tensor.is_meta]
        if func in READS and on_meta:
            self._count(func)
            return func(*tree_map_only(Tensor, _ones, args), **tree_map_only(Tensor, _ones, kwargs))
        if func in COPIES:
            return self._copy(func, args, kwargs, on_meta=on_meta)
        # As on a GPU, a tensor of one number may come from the CPU.
        if on_meta and any(not tensor.is_meta and tensor.ndim > 0 for tensor in tensors):
            shapes = ", ".join(f"{tensor.device}{list(tensor.shape)}" for tensor in tensors)
            raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any, *, on_meta: list[Tensor]) -> Any:
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            if source.is_meta and not target.is_meta:
                self._count(func)
                return target.copy_(_ones(source))
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            if target.is_meta and not source.is_meta and not non_blocking:
                self.slow_copies.append(tuple(source.shape))
            return func(*args, **kwargs)
        to = kwargs.get("device")
        if not on_meta and to is not None and torch.device(to).type == "meta" and not kwargs.get("non_blocking"):
            self.slow_copies.append(tuple(args[0].shape))
        if on_meta and to is not None and torch.device(to).type == "cpu":
            self._count(func)
            return func(_ones(args[0]), **kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any) -> None:
        own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PROJECT)]
        place = f"{Path(own[-1].filename).name}: {own[-1].line}" if own else "outside of lora_cli"
        self.waits[f"{place} ({func})"] += 1


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, device=CPU) if tensor.is_meta else tensor
