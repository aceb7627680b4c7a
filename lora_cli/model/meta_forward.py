"""Run a model without weights, on torch's meta device, so that autograd saves tensors of the sizes that a device saves.

Tensors of the meta device have shapes, and no values. What a model asks of values is answered here, the same for all
models; where kernels of the device save something else than the meta device, theirs is saved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What is answered for a tensor without values: conditions hold, but for those of all values, and equality of single
# values. So a mask of padding is not full, and rows are packed.
EQUAL = (Tensor.eq, Tensor.__eq__, torch.eq)
ANSWERS: dict[Callable[..., Any], Any] = {
    Tensor.__bool__: True,
    Tensor.__contains__: False,
    Tensor.__float__: 1.0,
    Tensor.__index__: 1,
    Tensor.__int__: 1,
    Tensor.item: 1,
    torch.equal: True,
}


class MetaForward(TorchFunctionMode):
    """Within it, tensors of the meta device behave as those of a CPU, or of a GPU."""

    def __init__(self, *, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_meta:
            return func(*args, **kwargs)
        if func in ANSWERS:
            return ANSWERS[func]
        if (func in (Tensor.all, torch.all) and len(args) == 1 and not kwargs) or (func in EQUAL and first.ndim == 0):
            return torch.tensor(False)
        if func is Tensor.tolist:
            return torch.ones(first.shape, dtype=first.dtype, device="cpu").tolist()
        if func is torch.unique_consecutive:
            return first.new_empty(1)
        if func in (Tensor.nonzero, torch.nonzero):
            return torch.stack(_positions(first), dim=-1)
        if func is torch.where and len(args) == 1:
            return _positions(first)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(first, _without_masks(args[1]), *args[2:])
        if func is Tensor.split:
            return _split(*args, **kwargs)
        if func is torch._grouped_mm:  # of experts, which the meta device has in bfloat16 only
            return first @ args[1][0]
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.dropout and not self._on_cpu:
            return _dropout_of_gpu(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the output of the kernel that the device has; on the CPU, it has none for dropout, for example."""
        dropout = args[0] if args else kwargs.get("dropout_p", 0.0)
        alike = query.shape[-1] == value.shape[-1] and (query.shape[1] == key.shape[1] or kwargs.get("enable_gqa"))
        if self._on_cpu and (dropout or not alike):
            output: Tensor = functional.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
            return output
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        flash: Tensor = FlashAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return flash


class FlashAttention(torch.autograd.Function):
    """What a kernel saves that does not write the scores: inputs, output, and an fp32 value for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return an output [..., L, E] for query [..., L, D], key [..., M, D] and value [..., M, E]."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _positions(mask: Tensor) -> tuple[Tensor, ...]:
    """Return the positions of all values of `mask` in each of its dimensions: those that hold are not known."""
    return tuple(mask.new_empty(mask.numel(), dtype=torch.int64) for _ in range(mask.ndim))


def _without_masks(index: Any) -> Any:
    """Return an index of a tensor with positions in place of masks."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(_is_mask(part) for part in parts):
        return index
    return tuple(each for part in parts for each in (_positions(part) if _is_mask(part) else (part,)))


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_meta and part.dtype == torch.bool


def _split(x: Tensor, sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Return the parts of `x`; even ones if their sizes are values, such as the tokens of each expert."""
    if isinstance(sizes, list) and sum(sizes) != x.shape[dim]:
        return x.tensor_split(len(sizes), dim)
    parts: tuple[Tensor, ...] = x.split(sizes, dim)
    return parts


def _dropout_of_gpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Return what is saved with a mask of bools; a CPU saves factors in the dtype of `input`."""
    return torch.native_dropout(input, p, training)[0] if training and p else input
