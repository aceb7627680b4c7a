"""One autograd step for a LoRA linear layer: the product of W and the update share one output and one backward.

PEFT's layer makes some eight passes over activations (casts, dropout, scaling, sums), and saves several copies.
Here the update is added in place by the matrix product itself (addmm), only x and x·Aᵀ are kept, and dropout draws
a random number per dropped element instead of one per element. The result is PEFT's: a test compares outputs and
gradients. Only plain LoRA on plain linear layers on the CPU is taken over; every other layer keeps PEFT's forward
(on a GPU this file was never measured, so it stays out of the way there).
"""

import math
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def fuse(model: PeftModel) -> int:
    """Give every plain LoRA layer of `model` the fused forward; returns how many there were.

    Call it again after adapters were added or switched: it undoes itself where a layer is no longer plain.
    """
    count = 0
    for module in model.modules():
        if type(module) is not LoraLinear:
            continue
        module.__dict__.pop("forward", None)
        if _is_plain(module):
            # On the instance, not the class: PEFT's class stays what it is for everyone else in the process.
            module.forward = partial(_forward, module)
            count += 1
    return count


def _is_plain(layer: LoraLinear) -> bool:
    adapters = layer.active_adapters
    return (
        len(adapters) == 1
        and adapters[0] in layer.lora_A
        and adapters[0] not in layer.lora_variant  # DoRA and its kin change the formula
        and type(layer.base_layer) is nn.Linear
        and layer.base_layer.weight.device.type == "cpu"
        and not layer.fan_in_fan_out
        and layer.lora_B[adapters[0]].bias is None
        and not layer.base_layer.weight.requires_grad
        and (layer.base_layer.bias is None or not layer.base_layer.bias.requires_grad)
    )


def _forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = layer.active_adapters
    if args or kwargs or layer.disable_adapters or layer.merged or not torch.is_grad_enabled():
        result: Tensor = LoraLinear.forward(layer, x, *args, **kwargs)
        return result
    name = adapters[0]
    base = layer.base_layer
    dropout = layer.lora_dropout[name]
    scale = layer.scaling[name]
    dropped = None
    if isinstance(dropout, nn.Dropout) and layer.training:
        dropped = draw_dropped(x.numel(), dropout.p)
        scale = scale / (1 - dropout.p)
    fused: Tensor = LoraProduct.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, scale, dropped
    )
    return fused


def draw_dropped(count: int, p: float) -> Tensor:
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


class LoraProduct(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·((x∘kept)·Aᵀ)·Bᵀ (LoRA, arXiv:2106.09685, eq. 3), with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        """x [..., in] and weight [out, in] in the compute dtype, a [r, in] and b [out, r] in theirs (fp32).

        dropped: int64 positions in the flattened x that the adapter does not see; scale includes 1/(1-p) for it.
        """
        flat = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(flat, weight, bias)
        seen = _zeroed(flat, dropped)
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        inner = seen @ a_cast.T
        y.addmm_(inner, b_cast.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a_cast, b_cast, inner, dropped)
        ctx.scale, ctx.a_dtype, ctx.b_dtype = scale, a.dtype, b.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [..., out]."""
        flat, weight, a_cast, b_cast, inner, dropped = ctx.saved_tensors
        shape = (*grad.shape[:-1], weight.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b_cast).mul_(ctx.scale)
        grad_b = (grad.T @ inner).to(ctx.b_dtype).mul_(ctx.scale)
        # x is masked again rather than its masked copy being kept through the forward pass.
        seen = _zeroed(flat, dropped)
        grad_a = (grad_inner.T @ seen).to(ctx.a_dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if dropped is None:
                grad_x.addmm_(grad_inner, a_cast)
            else:
                through_a = grad_inner @ a_cast
                through_a.view(-1)[dropped] = 0
                grad_x.add_(through_a)
            grad_x = grad_x.view(shape)
        return grad_x, None, None, grad_a, grad_b, None, None
