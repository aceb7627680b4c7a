"""Fused LoRA linear layers: base product and update in one autograd step, registered with PEFT as custom layers.

PEFT's layer makes about eight passes over activations (casts, dropout, scaling, sums), and saves several copies.
Here the matrix product itself adds the update in place (addmm), and only x and x·Aᵀ are saved. Dropout draws one random
number per dropped element on the CPU, where drawing is expensive. On a GPU, where the number of dropped elements is not
known without waiting for it, it draws a mask, and in the backward pass the same mask again, from the same seed. A 4-bit
W is dequantized for each of the two products and kept for neither. The results are those of PEFT's layer: a test
compares outputs and gradients. Only LoRA on plain and on 4-bit linear layers is fused; other layers, and inference, run
PEFT's forward.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations.gguf.utils import GgufLinear

from lora_cli.model.experts_lora import experts_layer
from lora_cli.model.gguf_base import PackedLora


class FusedLora(LoraLinear):  # type: ignore[misc]  # PEFT has no types
    """LoRA over a plain linear layer; see the first lines of this file."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W·x + b + scale·B·A·x for x [..., in], as [..., out] in the dtype of x."""
        if args or kwargs or not _runs_fused(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _fused_forward(self, x, lambda: self.base_layer.weight)


class FusedLora4bit(LoraLinear4bit):  # type: ignore[misc]  # PEFT has no types
    """LoRA over a 4-bit linear layer of bitsandbytes; see the first lines of this file."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W·x + b + scale·B·A·x for x [..., in], as [..., out] in the dtype of x."""
        base = self.base_layer
        # If x has another dtype than the layer, PEFT and the base layer cast it: run PEFT's forward.
        same_dtype = base.compute_dtype == x.dtype and (base.bias is None or base.bias.dtype == x.dtype)
        if args or kwargs or not same_dtype or not _runs_fused(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _fused_forward(self, x, lambda: dequantize_4bit(base.weight.data, base.weight.quant_state).to(x.dtype))


def register_custom_layers(config: LoraConfig) -> None:
    """Have PEFT use our LoRA layers: those over packed GGUF layers and packed experts, which PEFT does not support, and
    the fused ones.

    Call it before an adapter is attached or loaded with `config`. PEFT marks the hook as experimental.
    """
    # The order counts: the first entry whose type fits a layer is used.
    config._register_custom_module({GgufLinear: PackedLora, nn.Linear: _fused_layer, nn.Module: experts_layer})


def _fused_layer(
    target: nn.Module, adapter_name: str, *, config: LoraConfig, parameter_name: str | None = None, **options: Any
) -> LoraLayer | None:
    """Return the fused layer over `target`, or None to let PEFT choose the layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None or config.fan_in_fan_out:
        return None
    if type(base) is nn.Linear and type(base.weight) is nn.Parameter:
        return FusedLora(target, adapter_name, config=config, **options)
    if type(base) is Linear4bit and options.get("loaded_in_4bit"):
        packed: Any = base.weight
        layout = {
            "compute_dtype": base.compute_dtype,
            "compress_statistics": packed.compress_statistics,
            "quant_type": packed.quant_type,
        }
        return FusedLora4bit(target, adapter_name, config=config, **options, **layout)
    return None


def is_fusable(layer: nn.Module) -> bool:
    """Return whether `layer` is one of ours whose training forward is fused: plain LoRA, with one adapter."""
    if not isinstance(layer, (FusedLora, FusedLora4bit)):
        return False
    lora: Any = layer
    adapters, base = lora.active_adapters, lora.base_layer
    return bool(
        len(adapters) == 1
        and adapters[0] in lora.lora_A
        and adapters[0] not in lora.lora_variant  # DoRA and similar methods change the formula
        and lora.lora_B[adapters[0]].bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )


def _runs_fused(layer: Any) -> bool:
    return torch.is_grad_enabled() and not layer.disable_adapters and not layer.merged and is_fusable(layer)


def _fused_forward(layer: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
    name = layer.active_adapters[0]
    dropout, scale = layer.lora_dropout[name], layer.scaling[name]
    dropped = None
    if isinstance(dropout, nn.Dropout) and layer.training:
        dropped = draw_dropped(x, dropout.p)
        scale = scale / (1 - dropout.p)
    fused: Tensor = FusedLoraFunction.apply(  # type: ignore[no-untyped-call]
        x, weight, layer.base_layer.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, scale, dropped
    )
    return fused


class SeededMask(NamedTuple):
    """What dropout zeroes, drawn anew from its seed wherever it is used.

    Kept for the backward pass, the masks of all layers of an 8B model would take 5 GB at 4,096 tokens.
    """

    seed: int
    p: float

    def draw(self, x: Tensor) -> Tensor:
        """Return bool in the shape and on the device of x: true if dropped."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.p, generator=generator)


def draw_dropped(x: Tensor, p: float) -> Tensor | SeededMask:
    """Return what dropout with probability `p` zeroes in x.

    Returns:
        On the CPU, int64 [dropped]: positions in the flattened x. Elsewhere a mask, with a seed from torch's default
        generator of the CPU, so that the host does not wait.
    """
    if x.device.type == "cpu":
        return draw_dropout_positions(x.numel(), p)
    return SeededMask(int(torch.randint(1 << 62, ())), p)


def draw_dropout_positions(count: int, p: float) -> Tensor:
    """Return the positions out of `count` that dropout with probability `p` zeroes: int64 [dropped], ascending.

    Each position is dropped independently. The gaps between dropped positions are geometric,
    floor(log(1-u)/log(1-p)) + 1 for uniform u, so that p·count numbers are drawn instead of count: drawing is the
    expensive part of dropout on the CPU. The numbers come from torch's default generator.
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


def _without(x: Tensor, dropped: Tensor | SeededMask | None) -> Tensor:
    """Return x with zeros where it is dropped, see `draw_dropped`; x itself if nothing is."""
    # A contiguous copy: a transposed x would have no flat view.
    return x if dropped is None else _drop_(x.clone(memory_format=torch.contiguous_format), dropped)


def _drop_(x: Tensor, dropped: Tensor | SeededMask) -> Tensor:
    """Write zeros into the contiguous x [tokens, in] where it is dropped."""
    if isinstance(dropped, SeededMask):
        return x.masked_fill_(dropped.draw(x), 0)
    x.view(-1)[dropped] = 0
    return x


class FusedLoraFunction(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·((x∘kept)·Aᵀ)·Bᵀ (LoRA, arXiv:2106.09685, eq. 3), with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropped: Tensor | SeededMask | None,
    ) -> Tensor:
        """Return y [..., out] in the dtype of x.

        Args:
            ctx: of autograd.
            x: [..., in], in the compute dtype.
            weight: returns W [out, in], in the compute dtype.
            bias: [out], in the compute dtype, or None.
            a: [r, in], fp32.
            b: [out, r], fp32.
            scale: alpha/r, times 1/(1-p) with dropout.
            dropped: what of x is zeroed for the adapter, see `draw_dropped`; or None.
        """
        flat, w = x.reshape(-1, x.shape[-1]), weight()
        # The result is no view of another tensor: models may add to it in place, which autograd forbids on a view.
        result = x.new_empty(*x.shape[:-1], w.shape[0])
        y = result.view(-1, w.shape[0])
        if bias is None:
            torch.mm(flat, w.T, out=y)
        else:
            torch.addmm(bias, flat, w.T, out=y)
        masked = _without(flat, dropped)
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        inner = masked @ a_cast.T
        y.addmm_(inner, b_cast.T, alpha=scale)
        # A frozen A (LoRA-FA) has no gradient, so its input, the largest saved tensor, is not saved.
        kept = flat if ctx.needs_input_grad[3] else None
        ctx.mask = dropped if isinstance(dropped, SeededMask) else None
        ctx.save_for_backward(kept, a_cast, b_cast, inner, None if ctx.mask else dropped)
        ctx.scale, ctx.a_dtype, ctx.b_dtype, ctx.weight = scale, a.dtype, b.dtype, weight
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; `grad` is [..., out]."""
        flat, a_cast, b_cast, inner, positions = ctx.saved_tensors
        dropped = positions if ctx.mask is None else ctx.mask
        shape = (*grad.shape[:-1], a_cast.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b_cast).mul_(ctx.scale)
        grad_b = (grad.T @ inner).to(ctx.b_dtype).mul_(ctx.scale)
        grad_a = None
        if flat is not None:
            # Mask x again: saving its masked copy in the forward pass would need more memory.
            grad_a = (grad_inner.T @ _without(flat, dropped)).to(ctx.a_dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight()
            if dropped is None:
                grad_x.addmm_(grad_inner, a_cast)
            else:
                grad_x.add_(_drop_(grad_inner @ a_cast, dropped))
            grad_x = grad_x.view(shape)
        return grad_x, None, None, grad_a, grad_b, None, None
