"""One autograd step for a LoRA linear layer: the product of W and the update share one output and one backward.

PEFT's layer makes some eight passes over activations (casts, dropout, scaling, sums), and saves several copies.
Here the update is added in place by the matrix product itself (addmm), only x and x·Aᵀ are kept, and dropout draws
a random number per dropped element instead of one per element. A 4-bit W is dequantised for each of the two products
and kept for neither. The result is PEFT's: a test compares outputs and gradients. Only LoRA on plain and on 4-bit
linear layers on the CPU is taken over; every other layer keeps PEFT's forward (on a GPU this file was never measured,
so it stays out of the way there).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

# PEFT's layers whose forward may be taken over, each with the base layer that it must have.
TAKEN = {LoraLinear: nn.Linear, LoraLinear4bit: Linear4bit}


def fuse(model: PeftModel) -> int:
    """Give every plain LoRA layer of `model` the fused forward; returns how many there were.

    Call it again after adapters were added or switched: it undoes itself where a layer is no longer plain.
    """
    count = 0
    for module in model.modules():
        if type(module) not in TAKEN:
            continue
        module.__dict__.pop("forward", None)
        if _is_plain(module):
            # On the instance, not the class: PEFT's class stays what it is for everyone else in the process.
            module.forward = partial(_forward, module)
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    adapters = layer.active_adapters
    return (
        len(adapters) == 1
        and adapters[0] in layer.lora_A
        and adapters[0] not in layer.lora_variant  # DoRA and its kin change the formula
        and type(layer.base_layer) is TAKEN[type(layer)]
        and layer.base_layer.weight.device.type == "cpu"
        and not layer.fan_in_fan_out
        and layer.lora_B[adapters[0]].bias is None
        and not layer.base_layer.weight.requires_grad
        and (layer.base_layer.bias is None or not layer.base_layer.bias.requires_grad)
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = layer.active_adapters
    whole = _whole_weight(layer.base_layer, x.dtype)
    if args or kwargs or layer.disable_adapters or layer.merged or not torch.is_grad_enabled() or whole is None:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    name = adapters[0]
    base = layer.base_layer
    dropout = layer.lora_dropout[name]
    scale = layer.scaling[name]
    dropped = None
    if isinstance(dropout, nn.Dropout) and layer.training:
        dropped = draw_dropout_positions(x.numel(), dropout.p)
        scale = scale / (1 - dropout.p)
    fused: Tensor = FusedLoraFunction.apply(  # type: ignore[no-untyped-call]
        x, whole, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, scale, dropped
    )
    return fused


def _whole_weight(base: Any, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """What gives the base's weight [out, in] in the dtype of the products; None where PEFT and the base would cast."""
    if not isinstance(base, Linear4bit):
        return lambda: base.weight
    if base.compute_dtype != dtype or (base.bias is not None and base.bias.dtype != dtype):
        return None
    return lambda: dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


def draw_dropout_positions(count: int, p: float) -> Tensor:
    """Positions (int64, ascending) out of `count` that dropout with probability p zeroes, each independently.

    The gaps between dropped positions are geometric, floor(log(1-u)/log(1-p)) + 1 for uniform u, so p·count
    numbers are drawn rather than count: drawing is what dropout costs on the CPU. Draws from torch's generator,
    so that a checkpoint of its state repeats the positions.
    """
    # Six standard deviations more than expected: a second round is drawn once in a billion calls.
    size = int(count * p + 6 * math.sqrt(count * p) + 16)
    parts: list[Tensor] = []
    last = -1
    while last < count:
        gaps = torch.rand(size).neg_().log1p_().div_(math.log1p(-p)).floor_().add_(1)
        parts.append(gaps.to(torch.int64).cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    positions = torch.cat(parts) if len(parts) > 1 else parts[0]
    return positions[: int(torch.searchsorted(positions, count))]


def _zeroed(x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)  # else a transposed x would have no flat view
    copy.view(-1)[positions] = 0
    return copy


class FusedLoraFunction(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·((x∘kept)·Aᵀ)·Bᵀ (LoRA, arXiv:2106.09685, eq. 3), with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        whole: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        """x [..., in] and whole(), W [out, in], in the compute dtype, a [r, in] and b [out, r] in theirs (fp32).

        dropped: int64 positions in the flattened x that the adapter does not see; scale includes 1/(1-p) for it.
        """
        flat, weight = x.reshape(-1, x.shape[-1]), whole()
        y = nn.functional.linear(flat, weight, bias)
        seen = _zeroed(flat, dropped)
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        inner = seen @ a_cast.T
        y.addmm_(inner, b_cast.T, alpha=scale)
        # A frozen A (LoRA-FA) needs no input for its gradient, which is most of what a layer keeps.
        kept = flat if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, a_cast, b_cast, inner, dropped)
        ctx.scale, ctx.a_dtype, ctx.b_dtype, ctx.whole = scale, a.dtype, b.dtype, whole
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [..., out]."""
        flat, a_cast, b_cast, inner, dropped = ctx.saved_tensors
        shape = (*grad.shape[:-1], a_cast.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b_cast).mul_(ctx.scale)
        grad_b = (grad.T @ inner).to(ctx.b_dtype).mul_(ctx.scale)
        grad_a = None
        if flat is not None:
            # x is masked again rather than its masked copy being kept through the forward pass.
            grad_a = (grad_inner.T @ _zeroed(flat, dropped)).to(ctx.a_dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.whole()
            if dropped is None:
                grad_x.addmm_(grad_inner, a_cast)
            else:
                through_a = grad_inner @ a_cast
                through_a.view(-1)[dropped] = 0
                grad_x.add_(through_a)
            grad_x = grad_x.view(shape)
        return grad_x, None, None, grad_a, grad_b, None, None
