"""LoRA on the stacked weights of experts, in PEFT's format: the update is computed on the tokens of each expert.

PEFT's layer computes W + scale·BA of all experts at each forward pass, in the dtype of W: updates below its precision
(2^-9 of a bf16 weight) are rounded away, and without gradient checkpointing autograd keeps a full copy of the weights
of every layer. Here each expert multiplies its own tokens, y = W·x + scale·B·A·x, and a 4-bit W is dequantized expert
by expert, for each of the two passes, and kept for neither. Experts whose forward function is not one that transformers
exchanges (Llama 4, JetMoe) compute W + scale·BA as PEFT does, and compute it again in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_cli.model import experts

FACTORS = "lora_factors"  # attribute of an experts module while it runs under an adapter


class Factors(NamedTuple):
    """The update of a stacked weight, as PEFT's layer stores it: scale·B·A for each expert."""

    a: Tensor  # [experts, rank, in], fp32
    b: Tensor  # [experts, out, rank], fp32
    scale: float
    rows_are_inputs: bool  # whether the weight is [experts, in, out]


class ParamWrapper(PeftParamWrapper):  # type: ignore[misc]  # PEFT has no types, and recognizes the layer by this name
    """LoRA over one stacked weight of an experts module; see the first lines of this file."""

    def get_param(self) -> Any:
        """Return the weight; of a packed one, a placeholder with its shape, dtype and device."""
        packed = experts.packed_weight(self.get_base_layer(), self.parameter_name)
        return packed.placeholder() if packed is not None else super().get_param()

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Have the experts module run with the factors of the active adapters."""
        factors = [self._factors(name) for name in active_adapters if name in self.lora_A]
        if not factors:
            yield
            return
        active: dict[str, Factors] = self.get_base_layer().__dict__.setdefault(FACTORS, {})
        active[self.parameter_name] = factors[0] if len(factors) == 1 else _concatenate(factors)
        try:
            yield
        finally:
            del active[self.parameter_name]

    def _factors(self, name: str) -> Factors:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.reshape(self.num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return Factors(a, b, self.scaling[name], not self._did_swap_in_out_features)


def _concatenate(factors: list[Factors]) -> Factors:
    """Return the sum of several updates."""
    a = torch.cat([each.a for each in factors], dim=1)
    b = torch.cat([each.b * each.scale for each in factors], dim=2)
    return Factors(a, b, 1.0, factors[0].rows_are_inputs)


def experts_layer(
    target: nn.Module, adapter_name: str, *, config: LoraConfig, parameter_name: str | None = None, **options: Any
) -> ParamWrapper | None:
    """Return the layer over a stacked expert weight, or None to let PEFT choose the layer of `target`."""
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    parameter = base._parameters.get(parameter_name or "")
    if parameter_name is None or parameter is None or parameter.ndim != 3:
        return None
    run_with_factors(base)
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **options)


def run_with_factors(module: nn.Module) -> None:
    """Replace the forward function of an experts module by one that reads packed weights and active factors."""
    module.__dict__["forward"] = partial(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    factors: dict[str, Factors] = dict(module.__dict__.get(FACTORS, {}))
    packed = [name for name in module.__dict__.get(experts.ORDER, ()) if experts.packed_weight(module, name)]
    original = partial(type(module).forward, module)
    if not factors and not packed:
        return original(*args, **kwargs)
    values = (*args, *kwargs.values())
    if hasattr(module, "has_gate") and len(values) == 3:  # set by transformers' decorator of experts
        return _forward_sorted(module, *values, factors=factors)

    def run(*run_args: Any) -> Any:
        weights = {name: _updated_weight(module, name, factors.get(name)) for name in {*packed, *factors}}
        module.__dict__.update(weights)  # found before the parameters
        try:
            return original(*run_args, **kwargs)
        finally:
            for name in weights:
                del module.__dict__[name]

    if not torch.is_grad_enabled():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _updated_weight(module: nn.Module, name: str, factors: Factors | None) -> Tensor:
    """Return W + scale·BA of all experts, in the dtype of W."""
    packed = experts.packed_weight(module, name)
    weight: Tensor = packed.dense() if packed is not None else module.get_parameter(name)
    if factors is None:
        return weight
    left, right = (factors.a.mT, factors.b.mT) if factors.rows_are_inputs else (factors.b, factors.a)
    return torch.baddbmm(weight.float(), left.float(), right.float(), alpha=factors.scale).to(weight.dtype)


def _forward_sorted(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, factors: dict[str, Factors]
) -> Tensor:
    """Compute the experts' outputs as transformers' `grouped_mm_experts_forward` does: tokens sorted by expert.

    Args:
        module: the experts module.
        hidden: [tokens, hidden].
        top_k_index: experts of each token, [tokens, k].
        top_k_weights: their weights, [tokens, k].
        factors: of the adapted weights, by parameter name.

    Returns:
        [tokens, hidden], in the dtype of `hidden`.
    """
    tokens, k = top_k_index.shape
    expert_of, order = torch.sort(top_k_index.reshape(-1))
    # One wait for the GPU: the products have the shapes of what is routed to each expert.
    borders = tuple(torch.searchsorted(expert_of, torch.arange(module.num_experts + 1, device=hidden.device)).tolist())
    multiply = partial(_multiply, module, factors=factors, expert_of=expert_of, borders=borders)
    inner = multiply("gate_up_proj" if module.has_gate else "up_proj", hidden[order // k])
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = multiply("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return out[inverse].view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def _multiply(
    module: Any, name: str, x: Tensor, *, factors: dict[str, Factors], expert_of: Tensor, borders: tuple[int, ...]
) -> Tensor:
    """Return W·x + b + scale·BA·x of each token's expert: x [rows, in] sorted by expert → [rows, out], dtype of x."""
    packed, transposed = experts.packed_weight(module, name), bool(module.is_transposed)
    if packed is not None:
        scales, dtype = packed.scales(), packed.compute_dtype
        out_features = packed.shape[2 if transposed else 1]

        def weight(index: int) -> Tensor:
            own = packed.expert(index, scales)
            return own.T if transposed else own

    else:
        stacked: Tensor = getattr(module, name)
        dtype, out_features = stacked.dtype, stacked.shape[2 if transposed else 1]

        def weight(index: int) -> Tensor:
            return stacked[index].T if transposed else stacked[index]

    update = factors.get(name, Factors(None, None, 0.0, transposed))  # type: ignore[arg-type]
    y: Tensor = ExpertsLoraFunction.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), weight, out_features, borders, update.a, update.b, update.scale
    )
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[expert_of]
    return y.to(x.dtype)


class ExpertsLoraFunction(torch.autograd.Function):
    """y = W_e·x + scale·B_e·A_e·x for rows of x that are sorted by their expert e, with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[int], Tensor],
        out_features: int,
        borders: tuple[int, ...],
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return y [rows, out] in the dtype of x.

        Args:
            ctx: of autograd.
            x: [rows, in], in the compute dtype.
            weight: returns W [out, in] of an expert, in the compute dtype.
            out_features: of W.
            borders: rows of expert e are those from borders[e] to borders[e + 1].
            a: [experts, rank, in], fp32; None without an update.
            b: [experts, out, rank], fp32; None without an update.
            scale: of the update.
        """
        y = x.new_empty(len(x), out_features)
        inner = x.new_empty(len(x), 0 if a is None else a.shape[1])
        for expert, (start, stop) in enumerate(pairwise(borders)):
            if start == stop:
                continue
            rows = slice(start, stop)
            torch.mm(x[rows], weight(expert).T, out=y[rows])
            if a is not None and b is not None:
                torch.mm(x[rows], a[expert].to(x.dtype).T, out=inner[rows])
                y[rows].addmm_(inner[rows], b[expert].to(x.dtype).T, alpha=scale)
        kept = x if a is not None and ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept, a, b, inner)
        ctx.weight, ctx.borders, ctx.scale, ctx.columns = weight, borders, scale, x.shape[1]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; `grad` is [rows, out]."""
        x, a, b, inner = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        grad_x = grad.new_empty(len(grad), ctx.columns) if needs_x else None
        # Experts without a token get a gradient of zero.
        grad_a = torch.zeros_like(a, memory_format=torch.contiguous_format) if needs_a else None
        grad_b = torch.zeros_like(b, memory_format=torch.contiguous_format) if needs_b else None
        for expert, (start, stop) in enumerate(pairwise(ctx.borders)):
            if start == stop:
                continue
            rows = slice(start, stop)
            own = grad[rows]
            if grad_x is not None:
                torch.mm(own, ctx.weight(expert), out=grad_x[rows])
            if a is None or b is None:
                continue
            grad_inner = (own @ b[expert].to(own.dtype)).mul_(ctx.scale)
            if grad_x is not None:
                grad_x[rows].addmm_(grad_inner, a[expert].to(own.dtype))
            if grad_a is not None:
                grad_a[expert] = grad_inner.T @ x[rows]
            if grad_b is not None:
                grad_b[expert] = (own.T @ inner[rows]).mul_(ctx.scale)
        return grad_x, None, None, None, grad_a, grad_b, None
