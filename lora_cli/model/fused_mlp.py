"""MLPs as one autograd step: the wide layers share x, and what lies between them and the last layer is not kept.

Of a gated MLP, down(act(gate(x)) * up(x)), autograd keeps four tensors of the intermediate size: gate(x), act(gate(x)),
up(x) and their product. Here only gate(x) and up(x) are kept, and the others are computed again in the backward pass,
which is cheap beside a matrix product. The gradients of x from gate and up are added within the products. Each of the
layers may have LoRA or not (`lora_product.py`). Whether a module computes one of these forms is read from the code of
its forward function, which must be that of a class of transformers, or of the kernels that replaced it. Where a layer
is of another kind, and in inference, the module's own forward runs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from lora_cli.model.fused_lora import (
    PLAIN_LAYERS,
    FusedLora,
    FusedLora4bit,
    FusedProduct,
    base_product,
    is_frozen,
    lora_product,
    multiplies_in,
    runs_fused,
)
from lora_cli.model.lora_product import LoraProduct

FORM = "_fused_form"  # attribute of a module whose forward was replaced
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


class Form(NamedTuple):
    """What a kind of MLP computes: last(hidden(wide layers of x))."""

    source: tuple[str, str]  # module and class whose forward function computes it
    wide: tuple[str, ...]  # attributes: layers that multiply x
    activation: str
    last: str
    hidden: Hidden
    kept: int = 2  # values that are kept for the backward pass, for each input value of the last layer


_GATE_UP = ("gate_proj", "up_proj"), "act_fn", "down_proj"
FORMS = (
    Form(("transformers.models.llama.modeling_llama", "LlamaMLP"), *_GATE_UP, GATED),
    Form(("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLMLP"), *_GATE_UP, GATED),
    Form(
        ("transformers.models.phi3.modeling_phi3", "Phi3MLP"), ("gate_up_proj",), "activation_fn", "down_proj", PACKED
    ),
    Form(("transformers.models.phi.modeling_phi", "PhiMLP"), ("fc1",), "activation_fn", "fc2", SINGLE, 1),
    Form(
        ("transformers.models.falcon.modeling_falcon", "FalconMLP"),
        ("dense_h_to_4h",),
        "act",
        "dense_4h_to_h",
        SINGLE,
        1,
    ),
    Form(
        ("transformers.models.gpt_neox.modeling_gpt_neox", "GPTNeoXMLP"),
        ("dense_h_to_4h",),
        "act",
        "dense_4h_to_h",
        SINGLE,
        1,
    ),
)
# Kernels that replace the forward functions of modules, by the package that must have been imported.
KERNEL_FORMS = {
    "liger_kernel": (
        Form(("liger_kernel.transformers.swiglu", "LigerSwiGLUMLP"), *_GATE_UP, Hidden(_swiglu, _swiglu_backward)),
        Form(("liger_kernel.transformers.geglu", "LigerGEGLUMLP"), *_GATE_UP, Hidden(_geglu, _geglu_backward)),
    )
}


def fuse_mlps(model: nn.Module) -> int:
    """Have each MLP of `model` that computes a known form run as one step in training; return how many there are."""
    count = 0
    for module in model.modules():
        form = _form_of(module)
        if form:
            own = module.forward.__func__  # type: ignore[attr-defined]  # a bound method
            module.__dict__[FORM] = form, own
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def values_kept(model: nn.Module) -> int | None:
    """Return how many values an MLP of `model` keeps as one step, for each input value of its last layer.

    None if it has no MLP of a known form.
    """
    forms = (module.__dict__[FORM][0] if FORM in module.__dict__ else _form_of(module) for module in model.modules())
    return next((form.kept for form in forms if form), None)


def _form_of(module: nn.Module) -> Form | None:
    """Return the form that `module` computes, or None."""
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    for form in _forms():
        activation = getattr(module, form.activation, None)
        names = (*form.wide, form.last)
        if type(activation) in GRADIENTS and all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            reference = getattr(import_module(form.source[0]), form.source[1])
            # Kernels may have put a class of their own in its place.
            if reference.__module__ == form.source[0] and _does(function) == _does(reference.forward):
                return form
    return None


def _forms() -> Iterator[Form]:
    yield from FORMS
    for package, forms in KERNEL_FORMS.items():
        if package in sys.modules:
            yield from forms


def _does(function: FunctionType) -> tuple[Any, ...]:
    """Return what `function` does, and with which attributes and constants; local names and its docstring count not."""
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, constants, code.co_argcount


def _forward(mlp: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of `mlp`, of the shape and dtype of its input."""
    form, own = mlp.__dict__[FORM]
    output: Tensor
    if len(args) == 1 and not kwargs and torch.is_grad_enabled():
        (x,) = args
        layers = [getattr(mlp, name) for name in (*form.wide, form.last)]
        if all(_runs_fused(layer, x.dtype) for layer in layers):
            activation = getattr(mlp, form.activation)
            wide = [_product(layer, x) for layer in layers[:-1]]
            # Only shape, dtype and device of h are needed to draw what its dropout zeroes.
            h = x.new_empty(()).expand(*x.shape[:-1], layers[-1].in_features)
            products = (*wide, _product(layers[-1], h))
            factors = [factor for product in products for factor in (product.a, product.b)]
            step = Step(tuple(p.product for p in products), form.hidden, activation, GRADIENTS[type(activation)])
            output = FusedMlpFunction.apply(x, step, *factors)  # type: ignore[no-untyped-call]
            return output
    output = own(mlp, *args, **kwargs)
    return output


def _runs_fused(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether `layer` is a linear layer, with or without LoRA, that only multiplies a tensor of `dtype`."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if isinstance(layer, (FusedLora, FusedLora4bit)):
        return runs_fused(layer, dtype)
    return type(layer) in (*PLAIN_LAYERS, Linear4bit) and is_frozen(layer) and multiplies_in(layer, dtype)


def _product(layer: Any, x: Tensor) -> FusedProduct:
    return lora_product(layer, x) if isinstance(layer, (FusedLora, FusedLora4bit)) else base_product(layer, x.dtype)


class Step(NamedTuple):
    """What a fused MLP computes, all but its tensors."""

    products: tuple[LoraProduct, ...]  # of the wide layers, and of the last
    hidden: Hidden
    activate: Activation
    gradient: Gradient


class FusedMlpFunction(torch.autograd.Function):
    """last(hidden(wide layers of x)), with gradients of x and of the A and B of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step, *factors: Tensor | None) -> Tensor:
        """Return y [..., out] in the dtype of x.

        Args:
            ctx: of autograd.
            x: [..., in], in the compute dtype.
            step: what is computed.
            factors: A [r, in] and B [out, r], fp32, of each layer in turn; None where it has no adapter.
        """
        pairs = _pairs(factors)
        *products, last = step.products
        outputs = [product.forward(x, *pair) for product, pair in zip(products, pairs, strict=False)]
        wide = [output for output, _ in outputs]
        y, inner = last.forward(step.hidden.forward(step.activate, wide), *pairs[-1])
        # Where every A is frozen or absent, no gradient needs x.
        kept = x.reshape(-1, x.shape[-1]) if any(ctx.needs_input_grad[2:-2:2]) else None
        split = [product.split() for product in step.products]
        ctx.step = step._replace(products=tuple(product for product, _ in split))
        inners = (*(each for _, each in outputs), inner)
        ctx.save_for_backward(kept, *wide, *factors, *inners, *(positions for _, positions in split))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors; `grad` is [..., out]."""
        step, needs = ctx.step, ctx.needs_input_grad
        count = len(step.products)
        x, *saved = ctx.saved_tensors
        wide = [each.view(-1, each.shape[-1]) for each in saved[: count - 1]]
        pairs = _pairs(saved[count - 1 : 3 * count - 1])
        inners, positions = saved[3 * count - 1 : 4 * count - 1], saved[4 * count - 1 :]
        layers = [
            partial(product.join(dropped).backward, inner=inner, a=a, b=b)
            for product, dropped, inner, (a, b) in zip(step.products, positions, inners, pairs, strict=True)
        ]
        flat = grad.reshape(-1, grad.shape[-1])
        h = step.hidden.forward(step.activate, wide) if needs[-2] else None
        grad_h, *gradients = layers[-1](flat, h, for_x=needs[0] or any(needs[2:-2]))
        if grad_h is None:
            return (*(None for _ in needs[:-2]), *gradients)
        del h
        grad_x: Tensor | None = None
        wide_gradients: list[Tensor | None] = []
        of_outputs = step.hidden.backward(step.activate, step.gradient, wide, grad_h)
        for number, (layer, each) in enumerate(zip(layers, of_outputs, strict=False)):
            needs_a = needs[2 + 2 * number]
            grad_x, *pair = layer(each, x if needs_a else None, for_x=needs[0], add_to=grad_x)
            wide_gradients += pair
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        return grad_x, None, *wide_gradients, *gradients


def _pairs(factors: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return A and B of each layer."""
    return list(zip(factors[::2], factors[1::2], strict=True))
