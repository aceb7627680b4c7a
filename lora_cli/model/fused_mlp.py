"""MLPs as one autograd step: the wide layers share x, and what lies between them and the last layer is not kept.

Of a gated MLP, down(act(gate(x)) * up(x)), autograd keeps four tensors of the intermediate size: gate(x), act(gate(x)),
up(x) and their product. Here only gate(x) and up(x) are kept, and the others are computed again in the backward pass,
which is cheap beside a matrix product. The gradients of x from gate and up are added within the products. Each of the
layers may have LoRA or not (`lora_product.py`). Whether a module is such an MLP is read from the code of its forward
function, which must be that of a class of transformers, or of the kernels that replaced it. Where a layer does more
than multiply, and in inference, the module's own forward runs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from lora_cli.model.fused_lora import (
    PLAIN_LAYERS,
    FusedLayer,
    FusedLora,
    FusedLora4bit,
    base_product,
    in_pairs,
    is_frozen,
    is_fusable,
    is_wrapped,
    layer_product,
    multiplies_in,
    runs_fused,
)
from lora_cli.model.lora_product import LoraProduct, multiply, multiply_backward

KIND = "_fused_kind"  # attribute of a module whose forward was replaced
Tensors = Sequence[Tensor]
Activation = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor], Tensor]  # of an activation's input, from that of its output and the input

GRADIENTS: dict[type[nn.Module], Gradient] = {
    nn.SiLU: torch.ops.aten.silu_backward,
    SiLUActivation: torch.ops.aten.silu_backward,
    GELUActivation: torch.ops.aten.gelu_backward,
    GELUTanh: lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    NewGELUActivation: lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    nn.ReLU: lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


class Hidden(NamedTuple):
    """How the input of the last layer, h [tokens, intermediate], comes from the outputs of the wide layers."""

    forward: Callable[[Activation, Tensors], Tensor]
    # The gradients of the wide layers' outputs. It may write to the gradient of h, and to these outputs.
    backward: Callable[[Activation, Gradient, Tensors, Tensor], Tensors]


def _gated(activate: Activation, wide: Tensors) -> Tensor:
    gate, up = wide
    return activate(gate) * up


def _gated_backward(activate: Activation, gradient: Gradient, wide: Tensors, grad: Tensor) -> Tensors:
    gate, up = wide
    return gradient(grad * up, gate), grad.mul_(activate(gate))


def _single(activate: Activation, wide: Tensors) -> Tensor:
    return activate(wide[0])


def _single_backward(_: Activation, gradient: Gradient, wide: Tensors, grad: Tensor) -> Tensors:
    return (gradient(grad, wide[0]),)


def _packed(activate: Activation, wide: Tensors) -> Tensor:
    gate, up = wide[0].chunk(2, dim=-1)
    return up * activate(gate)


def _packed_backward(activate: Activation, gradient: Gradient, wide: Tensors, grad: Tensor) -> Tensors:
    return (torch.cat(list(_gated_backward(activate, gradient, wide[0].chunk(2, dim=-1), grad)), dim=-1),)


def _swiglu(_: Activation, wide: Tensors) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    product: Tensor = swiglu_forward(*wide)[2]
    return product


def _swiglu_backward(_: Activation, gradient: Gradient, wide: Tensors, grad: Tensor) -> Tensors:
    from liger_kernel.ops.swiglu import swiglu_backward

    gradients: Tensors = swiglu_backward(*wide, grad)
    return gradients


def _geglu(_: Activation, wide: Tensors) -> Tensor:
    from liger_kernel.ops.geglu import geglu_forward

    product: Tensor = geglu_forward(*wide)[2]
    return product


def _geglu_backward(_: Activation, gradient: Gradient, wide: Tensors, grad: Tensor) -> Tensors:
    from liger_kernel.ops.geglu import geglu_backward

    gradients: Tensors = geglu_backward(*wide, grad)
    return gradients


GATED, SINGLE, PACKED = (
    Hidden(_gated, _gated_backward),
    Hidden(_single, _single_backward),
    Hidden(_packed, _packed_backward),
)


class MlpKind(NamedTuple):
    """What a kind of MLP computes: last(hidden(wide layers of x))."""

    source: tuple[str, str]  # module and class whose forward function computes it
    wide: tuple[str, ...]  # attributes: layers that multiply x
    activation: str
    last: str
    hidden: Hidden
    kept: int = 2  # values that are kept for the backward pass, for each input value of the last layer


_GATE_UP = ("gate_proj", "up_proj"), "act_fn", "down_proj"
KINDS = (
    MlpKind(("transformers.models.llama.modeling_llama", "LlamaMLP"), *_GATE_UP, GATED),
    MlpKind(("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLMLP"), *_GATE_UP, GATED),
    MlpKind(
        ("transformers.models.phi3.modeling_phi3", "Phi3MLP"), ("gate_up_proj",), "activation_fn", "down_proj", PACKED
    ),
    MlpKind(("transformers.models.phi.modeling_phi", "PhiMLP"), ("fc1",), "activation_fn", "fc2", SINGLE, 1),
    MlpKind(
        ("transformers.models.falcon.modeling_falcon", "FalconMLP"),
        ("dense_h_to_4h",),
        "act",
        "dense_4h_to_h",
        SINGLE,
        1,
    ),
    MlpKind(
        ("transformers.models.gpt_neox.modeling_gpt_neox", "GPTNeoXMLP"),
        ("dense_h_to_4h",),
        "act",
        "dense_4h_to_h",
        SINGLE,
        1,
    ),
)
# Kernels that replace the forward functions of modules, by the package that must have been imported.
KERNEL_KINDS = {
    "liger_kernel": (
        MlpKind(("liger_kernel.transformers.swiglu", "LigerSwiGLUMLP"), *_GATE_UP, Hidden(_swiglu, _swiglu_backward)),
        MlpKind(("liger_kernel.transformers.geglu", "LigerGEGLUMLP"), *_GATE_UP, Hidden(_geglu, _geglu_backward)),
    )
}


def fuse_mlps(model: nn.Module) -> int:
    """Have each MLP of `model` that is of a known kind run as one step in training; return how many there are."""
    count = 0
    for module in model.modules():
        kind = _kind_of(module)
        if kind:
            own = module.forward.__func__  # type: ignore[attr-defined]  # a bound method
            module.__dict__[KIND] = kind, own
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def values_kept(mlp: nn.Module) -> int | None:
    """Return how many values `mlp` keeps as one step, for each of the inputs of its last layer.

    Args:
        mlp: with the adapter attached.

    Returns:
        None if it is not an MLP of a known kind, or runs its own forward.
    """
    if KIND not in mlp.__dict__:
        return None
    kind: MlpKind = mlp.__dict__[KIND][0]
    layers = [getattr(mlp, name) for name in (*kind.wide, kind.last)]
    return kind.kept if all(_is_multiplication(layer) for layer in layers) else None


def _kind_of(module: nn.Module) -> MlpKind | None:
    """Return the kind of `module`; None if it is not an MLP of a known kind."""
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    for kind in _kinds():
        activation = getattr(module, kind.activation, None)
        names = (*kind.wide, kind.last)
        if type(activation) in GRADIENTS and all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            reference = getattr(import_module(kind.source[0]), kind.source[1])
            # Kernels may have put a class of their own in its place.
            if reference.__module__ == kind.source[0] and _behavior(function) == _behavior(reference.forward):
                return kind
    return None


def _kinds() -> Iterator[MlpKind]:
    yield from KINDS
    for package, kinds in KERNEL_KINDS.items():
        if package in sys.modules:
            yield from kinds


def _behavior(function: FunctionType) -> tuple[Any, ...]:
    """Return what `function` does, with which attributes and constants, without local names and its docstring."""
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, constants, code.co_argcount


def _forward(mlp: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of `mlp`, of the shape and dtype of its input."""
    kind, own = mlp.__dict__[KIND]
    output: Tensor
    if len(args) == 1 and not kwargs and torch.is_grad_enabled():
        (x,) = args
        layers = [getattr(mlp, name) for name in (*kind.wide, kind.last)]
        activation = getattr(mlp, kind.activation)
        if all(_only_multiplies(layer, x.dtype) for layer in layers) and not is_wrapped(activation):
            wide = [_product(layer, x) for layer in layers[:-1]]
            # Only shape, dtype and device of h are needed to draw what its dropout zeroes.
            h = x.new_empty(()).expand(*x.shape[:-1], layers[-1].in_features)
            products = (*wide, _product(layers[-1], h))
            factors = [tensor for product in products for tensor in product.factors]
            step = MlpStep(tuple(p.product for p in products), kind.hidden, activation, GRADIENTS[type(activation)])
            output = FusedMlpFunction.apply(x, step, *factors)  # type: ignore[no-untyped-call]
            return output
    output = own(mlp, *args, **kwargs)
    return output


def _only_multiplies(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether a call of `layer` now only multiplies a tensor of `dtype`, with or without LoRA."""
    if is_wrapped(layer):
        return False
    if isinstance(layer, (FusedLora, FusedLora4bit)):
        return runs_fused(layer, dtype)
    return _is_multiplication(layer) and multiplies_in(layer, dtype)


def _is_multiplication(layer: Any) -> bool:
    """Return whether `layer` is a frozen linear layer, or one with plain LoRA."""
    if isinstance(layer, (FusedLora, FusedLora4bit)):
        return is_fusable(layer)
    # Quantized weights of other libraries are tensors of their own types.
    plain = type(layer) in PLAIN_LAYERS and type(layer.weight) is nn.Parameter
    return (plain or type(layer) is Linear4bit) and is_frozen(layer)


def _product(layer: Any, x: Tensor) -> FusedLayer:
    return layer_product(layer, x) if isinstance(layer, (FusedLora, FusedLora4bit)) else base_product(layer, x.dtype)


class MlpStep(NamedTuple):
    """What a fused MLP computes; x and the factors are given separately."""

    products: tuple[LoraProduct, ...]  # of the wide layers, and of the last
    hidden: Hidden
    activate: Activation
    gradient: Gradient


class FusedMlpFunction(torch.autograd.Function):
    """last(hidden(wide layers of x)), with gradients of x and of the A and B of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: MlpStep, *factors: Tensor | None) -> Tensor:
        """Return y [..., out] in the dtype of x.

        Args:
            ctx: of autograd.
            x: [..., in], in the compute dtype.
            step: what is computed.
            factors: A [r, in] and B [out, r], fp32, of each layer in turn; None where it has no adapter.
        """
        pairs = in_pairs(factors)
        wide, inners = multiply(x, step.products[:-1], pairs[:-1])
        (y,), last_inner = multiply(step.hidden.forward(step.activate, wide), step.products[-1:], pairs[-1:])
        # Where every A is frozen or absent, no gradient needs x.
        kept = x.reshape(-1, x.shape[-1]) if any(ctx.needs_input_grad[2:-2:2]) else None
        split = [product.split() for product in step.products]
        ctx.step = step._replace(products=tuple(product for product, _ in split))
        ctx.save_for_backward(kept, *wide, *factors, *inners, *last_inner, *(positions for _, positions in split))
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors; `grad` is [..., out]."""
        step, needs = ctx.step, ctx.needs_input_grad
        count, trained_a = len(step.products), needs[2::2]
        x, *saved = ctx.saved_tensors
        wide = [each.view(-1, each.shape[-1]) for each in saved[: count - 1]]
        pairs = in_pairs(saved[count - 1 : 3 * count - 1])
        inners, positions = saved[3 * count - 1 : 4 * count - 1], saved[4 * count - 1 :]
        products = [product.join(each) for product, each in zip(step.products, positions, strict=True)]
        h = step.hidden.forward(step.activate, wide) if trained_a[-1] else None
        grad_h, of_last = multiply_backward(
            [grad.reshape(-1, grad.shape[-1])],
            h,
            products[-1:],
            pairs[-1:],
            inners[-1:],
            trained_a=trained_a[-1:],
            for_x=needs[0] or any(needs[2:-2]),
        )
        del h
        if grad_h is None:  # the last layer alone is trained
            return (*(None for _ in needs[:-2]), *of_last[0])
        grad_x, of_wide = multiply_backward(
            step.hidden.backward(step.activate, step.gradient, wide, grad_h),
            x,
            products[:-1],
            pairs[:-1],
            inners[:-1],
            trained_a=trained_a[:-1],
            for_x=needs[0],
        )
        factors = (tensor for each in (*of_wide, *of_last) for tensor in each)
        return None if grad_x is None else grad_x.view(ctx.shape), None, *factors
