"""Fused LoRA linear layers: base product and update in one autograd step, registered with PEFT as custom layers.

The computation is that of `lora_product.py`. The results are those of PEFT's layer: a test compares outputs and
gradients. Only LoRA on plain and on 4-bit linear layers is fused; other layers, and inference, run PEFT's forward.
"""

from collections.abc import Sequence
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
from transformers.models.falcon.modeling_falcon import FalconLinear

from lora_cli.model.experts_lora import experts_layer
from lora_cli.model.gguf_base import PackedLora
from lora_cli.model.lora_product import Factors, LoraProduct, draw_dropped, multiply, multiply_backward
from lora_cli.model.sharding import quant_state_of

SHARED = "_shared_input"  # attribute of a layer that has its input in common with others, see shared_input.py
PLAIN_LAYERS = (nn.Linear, FalconLinear)  # that multiply with their weight, and add their bias


class FusedLora(LoraLinear):  # type: ignore[misc]  # PEFT has no types
    """LoRA over a plain linear layer; see the first lines of this file."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W·x + b + scale·B·A·x for x [..., in], as [..., out] in the dtype of x."""
        if args or kwargs or not runs_fused(self, x.dtype):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _fused_forward(self, x)


class FusedLora4bit(LoraLinear4bit):  # type: ignore[misc]  # PEFT has no types
    """LoRA over a 4-bit linear layer of bitsandbytes; see the first lines of this file."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W·x + b + scale·B·A·x for x [..., in], as [..., out] in the dtype of x."""
        if args or kwargs or not runs_fused(self, x.dtype):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _fused_forward(self, x)


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
    if type(base) in PLAIN_LAYERS and type(base.weight) is nn.Parameter:
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
    adapters = lora.active_adapters
    return bool(
        len(adapters) == 1
        and adapters[0] in lora.lora_A
        and adapters[0] not in lora.lora_variant  # DoRA and similar methods change the formula
        and lora.lora_B[adapters[0]].bias is None
        and is_frozen(lora.base_layer)
    )


def is_frozen(base: nn.Module) -> bool:
    """Return whether no parameter of `base` is trained."""
    return not any(parameter.requires_grad for parameter in base.parameters())


def runs_fused(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether the forward pass of `layer` on a tensor of `dtype` is fused: in training, if it computes in it."""
    return (
        torch.is_grad_enabled()
        and not layer.disable_adapters
        and not layer.merged
        and is_fusable(layer)
        and multiplies_in(layer.base_layer, dtype)
    )


def multiplies_in(base: Any, dtype: torch.dtype) -> bool:
    """Return whether a tensor of `dtype` is multiplied as it is: a 4-bit `base` may cast it."""
    if not isinstance(base, Linear4bit):
        return True
    return bool(base.compute_dtype == dtype and (base.bias is None or base.bias.dtype == dtype))


def is_wrapped(module: Any) -> bool:
    """Return whether a call of `module` does more than the forward of its class: it has hooks, or a new forward."""
    if not isinstance(module, nn.Module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class FusedLayer(NamedTuple):
    """What a layer multiplies with."""

    product: LoraProduct
    factors: Factors


def base_product(base: Any, dtype: torch.dtype) -> FusedLayer:
    """Return the product with a plain or 4-bit linear layer alone, computed in `dtype`."""

    def weight() -> Tensor:
        if isinstance(base, Linear4bit):
            dense: Tensor = dequantize_4bit(base.weight.data, quant_state_of(base))
            return dense.to(dtype)
        plain: Tensor = base.weight
        return plain

    return FusedLayer(LoraProduct(weight, base.bias, 1.0, None), Factors(None, None))


def layer_product(layer: Any, x: Tensor) -> FusedLayer:
    """Return the product with a layer whose forward pass on x is fused, see `runs_fused`.

    Args:
        layer: one of ours.
        x: [..., in]; only its shape, dtype and device are read.
    """
    name = layer.active_adapters[0]
    dropout, scale = layer.lora_dropout[name], layer.scaling[name]
    dropped = None
    if isinstance(dropout, nn.Dropout) and layer.training:
        dropped = draw_dropped(x, dropout.p)
        scale = scale / (1 - dropout.p)
    product = base_product(layer.base_layer, x.dtype).product._replace(scale=scale, dropped=dropped)
    return FusedLayer(product, Factors(layer.lora_A[name].weight, layer.lora_B[name].weight))


def _fused_forward(layer: Any, x: Tensor) -> Tensor:
    shared = layer.__dict__.get(SHARED)
    if shared is not None and not torch.compiler.is_compiling():
        return shared.output(layer, x)  # type: ignore[no-any-return]
    return multiply_fused(x, [layer_product(layer, x)])[0]


def multiply_fused(x: Tensor, layers: Sequence[FusedLayer]) -> tuple[Tensor, ...]:
    """Return y [..., out] of each layer for the same x [..., in], as one autograd step."""
    factors = [tensor for layer in layers for tensor in layer.factors]
    products = tuple(layer.product for layer in layers)
    outputs: tuple[Tensor, ...] = FusedLoraFunction.apply(x, products, *factors)  # type: ignore[no-untyped-call]
    return outputs


class FusedLoraFunction(torch.autograd.Function):
    """Products of `lora_product.py` with the same x, with gradients of x and of all A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: tuple[LoraProduct, ...], *factors: Tensor | None) -> tuple[Tensor, ...]:
        """Return y [..., out] of each product, in the dtype of x.

        Args:
            ctx: of autograd.
            x: [..., in], in the compute dtype.
            products: what is computed.
            factors: A [r, in] and B [out, r], fp32, of each product in turn; None where it has no adapter.
        """
        outputs, inners = multiply(x, products, in_pairs(factors))
        # A frozen A (LoRA-FA) has no gradient, so its input, the largest saved tensor, is not saved.
        kept = x.reshape(-1, x.shape[-1]) if any(ctx.needs_input_grad[2::2]) else None
        split = [product.split() for product in products]
        ctx.products = tuple(product for product, _ in split)
        ctx.save_for_backward(kept, *factors, *inners, *(positions for _, positions in split))
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors; `grads` are [..., out]."""
        count, needs = len(ctx.products), ctx.needs_input_grad
        x, *saved = ctx.saved_tensors
        positions = saved[3 * count :]
        grad_x, gradients = multiply_backward(
            [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads],
            x,
            [product.join(each) for product, each in zip(ctx.products, positions, strict=True)],
            in_pairs(saved[: 2 * count]),
            saved[2 * count : 3 * count],
            trained_a=needs[2::2],
            for_x=needs[0],
        )
        return (
            None if grad_x is None else grad_x.view(ctx.shape),
            None,
            *(tensor for each in gradients for tensor in each),
        )


def in_pairs(tensors: Sequence[Tensor | None]) -> list[Factors]:
    """Return A and B of each layer, from a flat sequence."""
    return [Factors(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
