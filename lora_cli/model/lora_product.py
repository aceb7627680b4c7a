"""The product of a linear layer with LoRA, and its gradients, on flat tensors: what the fused functions are made of.

PEFT's layer makes about eight passes over activations (casts, dropout, scaling, sums), and saves several copies. Here
the matrix product itself adds the update in place (addmm), and only x and x·Aᵀ are needed for the backward pass.
Dropout draws one random number per dropped element on the CPU, where drawing is expensive. On a GPU, where the number
of dropped elements is not known without waiting for it, it draws a mask, and in the backward pass the same mask again,
from the same seed. A 4-bit W is dequantized for each of the two products and kept for neither.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
    """Return what dropout with probability `p` zeroes in a tensor of the shape and on the device of x.

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


class LoraProduct(NamedTuple):
    """y = x·Wᵀ + b + scale·((x∘kept)·Aᵀ)·Bᵀ (LoRA, arXiv:2106.09685, eq. 3), all but its tensors that are trained.

    x is [..., in], in the compute dtype. A [r, in] and B [out, r] are fp32; None if the layer has no adapter.
    """

    weight: Callable[[], Tensor]  # W [out, in], in the compute dtype
    bias: Tensor | None  # [out], in the compute dtype
    scale: float  # alpha/r, times 1/(1-p) with dropout
    dropped: Tensor | SeededMask | None  # what of x is zeroed for the adapter, see `draw_dropped`

    def split(self) -> tuple["LoraProduct", Tensor | None]:
        """Return it without the positions that it drops, and these, because autograd keeps tensors."""
        positions = self.dropped if isinstance(self.dropped, Tensor) else None
        return (self if positions is None else self._replace(dropped=None)), positions

    def join(self, positions: Tensor | None) -> "LoraProduct":
        """Return it with the positions of `split`."""
        return self if positions is None else self._replace(dropped=positions)

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y [..., out], and (x∘kept)·Aᵀ [tokens, r], or None without an adapter."""
        w, flat = self.weight(), x.reshape(-1, x.shape[-1])
        # The result is no view of another tensor: models may add to it in place, which autograd forbids on a view.
        result = x.new_empty(*x.shape[:-1], w.shape[0])
        y = result.view(-1, w.shape[0])
        if self.bias is None:
            torch.mm(flat, w.T, out=y)
        else:
            torch.addmm(self.bias, flat, w.T, out=y)
        if a is None or b is None:
            return result, None
        inner = _without(flat, self.dropped) @ a.to(x.dtype).T
        y.addmm_(inner, b.to(x.dtype).T, alpha=self.scale)
        return result, inner

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        inner: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        *,
        for_x: bool,
        add_to: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x [tokens, in], in the compute dtype, and of A and B, fp32; None for what has none.

        Args:
            grad: of y, [tokens, out].
            x: [tokens, in], or None for a frozen A.
            inner: of `forward`.
            a: as in `forward`.
            b: as in `forward`.
            for_x: whether x needs a gradient.
            add_to: a gradient of x to add to, in place.
        """
        grad_inner = grad_a = grad_b = None
        if a is not None and b is not None and inner is not None:
            grad_inner = (grad @ b.to(grad.dtype)).mul_(self.scale)
            grad_b = (grad.T @ inner).to(b.dtype).mul_(self.scale)
            if x is not None:
                # Mask x again: saving its masked copy in the forward pass would need more memory.
                grad_a = (grad_inner.T @ _without(x, self.dropped)).to(a.dtype)
        if not for_x:
            return None, grad_a, grad_b
        grad_x = grad @ self.weight() if add_to is None else add_to.addmm_(grad, self.weight())
        if a is not None and grad_inner is not None:
            if self.dropped is None:
                grad_x.addmm_(grad_inner, a.to(grad.dtype))
            else:
                grad_x.add_(_drop_(grad_inner @ a.to(grad.dtype), self.dropped))
        return grad_x, grad_a, grad_b
