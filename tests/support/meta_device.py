"""The meta device in the part of a GPU, on a machine that has none: what stays on the CPU raises, waits are counted.

torch's meta tensors have shapes but no data. Within `GpuPart`, an operation on tensors of both devices raises as on a
GPU, and each point at which the host would wait for the GPU is counted; there the host reads ones. A copy to the GPU is
waited for unless it is from page-locked memory and asks not to be.
"""

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes import functional
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lora_cli.data import pinning

META, CPU = torch.device("meta"), torch.device("cpu")
PROJECT = Path(__file__).resolve().parents[2] / "lora_cli"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# bitsandbytes makes this table once a process, on the device of the first weight that it quantizes: a meta tensor would
# be without values in all later tests.
functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
# The host asks for a value, for a shape that depends on values, or for whether a matrix was singular.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten._linalg_check_errors.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # nonzero() of a mask of bools
FROM_PYTHON = {torch.tensor, torch.as_tensor, Tensor.new_tensor}  # made on the CPU, and copied


class GpuPart(TorchDispatchMode):
    """Have meta tensors behave as a GPU's towards the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # by the line of lora_cli that caused them
        self.slow_copies: list[tuple[int, ...]] = []  # shapes of what was copied to the device while the host waited
        self.slow_places: Counter[str] = Counter()
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor gets it
        self._stack = ExitStack()

    def clear(self) -> None:
        """Forget all waits and copies so far."""
        self.waits.clear()
        self.slow_copies.clear()
        self.slow_places.clear()

    def __enter__(self) -> "GpuPart":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._stack.enter_context(patch.object(pinning, "has_gpu", lambda: True))
        self._stack.enter_context(patch.object(Tensor, "pin_memory", lambda tensor: self._pin(tensor)))
        self._stack.enter_context(_FromPython(self))
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stack.close()
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def _pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_meta = [tensor for tensor in tensors if tensor.is_meta]
        if on_meta and self._reads(func, args, kwargs):
            self._count(func)
            if func is aten._linalg_check_errors.default:
                return None  # ones would be errors
            result = func(*tree_map_only(Tensor, _ones, args), **tree_map_only(Tensor, _ones, kwargs))
            return args[0] if func is aten.index_put_.default else tree_map_only(Tensor, lambda t: t.to(META), result)
        if func in COPIES:
            return self._copy(func, args, kwargs, on_meta=on_meta)
        if on_meta and func in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and not index.is_meta:
                    self._count_copy(index, False)
            args = (args[0], [index.to(META) if isinstance(index, Tensor) else index for index in args[1]], *args[2:])
            return func(*args, **kwargs)
        # As on a GPU, a tensor of one number may come from the CPU.
        if on_meta and any(not tensor.is_meta and tensor.ndim > 0 for tensor in tensors):
            shapes = ", ".join(f"{tensor.device}{list(tensor.shape)}" for tensor in tensors)
            raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
        return func(*args, **kwargs)

    def _reads(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in INDEXING:
            return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return func in READS or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None)

    def _copy(self, func: Any, args: Any, kwargs: Any, *, on_meta: list[Tensor]) -> Any:
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            if source.is_meta and not target.is_meta:
                self._count(func)
                return target.copy_(_ones(source))
            if target.is_meta and not source.is_meta:
                self._count_copy(source, args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return func(*args, **kwargs)
        to = kwargs.get("device")
        if not on_meta and to is not None and torch.device(to).type == "meta":
            self._count_copy(args[0], kwargs.get("non_blocking"))
        if on_meta and to is not None and torch.device(to).type == "cpu":
            self._count(func)
            return func(_ones(args[0]), **kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any) -> None:
        self.waits[f"{_place()} ({func})"] += 1

    def _count_copy(self, source: Tensor, non_blocking: Any) -> None:
        if not source.numel():
            return  # nothing is copied
        if not non_blocking or source.untyped_storage().data_ptr() not in self._pinned:
            self.slow_copies.append(tuple(source.shape))
            self.slow_places[_place()] += 1


class _FromPython(TorchFunctionMode):
    """Count the copies within functions that make a tensor from numbers, which no dispatch mode sees."""

    def __init__(self, part: GpuPart) -> None:
        super().__init__()
        self._part = part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FROM_PYTHON and result.is_meta and not (args and isinstance(args[0], Tensor) and len(args) == 1):
            self._part._count_copy(torch.empty(result.shape), False)
        return result


def _place() -> str:
    """Return the line of lora_cli that is run, with its file."""
    own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PROJECT)]
    return f"{Path(own[-1].filename).name}: {own[-1].line}" if own else "outside of lora_cli"


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, device=CPU) if tensor.is_meta else tensor
