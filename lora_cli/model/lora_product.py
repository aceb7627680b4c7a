"""The product of a linear layer with LoRA, and its gradients, on flat tensors: what the fused functions are made of.

PEFT's layer makes about eight passes over activations (casts, dropout, scaling, sums), and saves several copies. Here
the matrix product itself adds the update in place (addmm), and only x and x·Aᵀ are needed for the backward pass.
Dropout draws one random number per dropped element on the CPU, where drawing is expensive. On a GPU, where the number
of dropped elements is not known without waiting for it, it draws a mask, and in the backward pass the same mask again,
from the same seed. A 4-bit W is dequantized for each of the two products and kept for neither.
"""

import math
from collections.abc import Callable, Sequence
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
    """y = x·Wᵀ + b + scale·((x∘kept)·Aᵀ)·Bᵀ (LoRA, arXiv:2106.09685, eq. 3), all but x and the trained A and B."""

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

    def base_output(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b, [..., out]."""
        w, flat = self.weight(), x.reshape(-1, x.shape[-1])
        # The result is no view of another tensor: models may add to it in place, which autograd forbids on a view.
        result = x.new_empty(*x.shape[:-1], w.shape[0])
        y = result.view(-1, w.shape[0])
        if self.bias is None:
            torch.mm(flat, w.T, out=y)
        else:
            torch.addmm(self.bias, flat, w.T, out=y)
        return result


class Factors(NamedTuple):
    """The trained tensors of one layer, fp32; None if it has no adapter."""

    a: Tensor | None  # [r, in]
    b: Tensor | None  # [out, r]


class Gradients(NamedTuple):
    """Of the factors of one layer, fp32; None for what has none."""

    a: Tensor | None
    b: Tensor | None


def multiply(
    x: Tensor, products: Sequence[LoraProduct], factors: Sequence[Factors]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the products of several layers with the same x [..., in].

    Returns:
        y [..., out] of each, and its (x∘kept)·Aᵀ [tokens, r], which the gradients need; None without an adapter.
    """
    outputs = [product.base_output(x) for product in products]
    flat = x.reshape(-1, x.shape[-1])
    inners = _inner_products(flat, products, [None if each.a is None else each.a.to(x.dtype) for each in factors])
    for product, y, inner, each in zip(products, outputs, inners, factors, strict=True):
        if inner is not None and each.b is not None:
            y.view(-1, y.shape[-1]).addmm_(inner, each.b.to(x.dtype).T, alpha=product.scale)
    return outputs, inners


def _inner_products(x: Tensor, products: Sequence[LoraProduct], a: Sequence[Tensor | None]) -> list[Tensor | None]:
    present = [each for each in a if each is not None]
    if len(present) > 1 and all(product.dropped is None for product in products):
        # One product with all A, which are narrow: x is read once.
        parts = iter((x @ torch.cat(present).T).split([each.shape[0] for each in present], dim=1))
        return [None if each is None else next(parts) for each in a]
    return [
        None if each is None else _without(x, product.dropped) @ each.T
        for product, each in zip(products, a, strict=True)
    ]


def multiply_backward(
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    products: Sequence[LoraProduct],
    factors: Sequence[Factors],
    inners: Sequence[Tensor | None],
    *,
    trained_a: Sequence[bool],
    for_x: bool,
) -> tuple[Tensor | None, list[Gradients]]:
    """Return the gradients of x [tokens, in], in the compute dtype, and of the factors, from those of `multiply`.

    Args:
        grads: of each y, [tokens, out]; None for a y that is not used.
        x: [tokens, in]; None if no A is trained.
        products: as in `multiply`.
        factors: as in `multiply`.
        inners: of `multiply`.
        trained_a: whether each A needs a gradient.
        for_x: whether x needs one.
    """
    grad_x: Tensor | None = None
    gradients, narrow = [], []
    for grad, product, (a, b), inner, trained in zip(grads, products, factors, inners, trained_a, strict=True):
        if grad is None:
            gradients.append(Gradients(None, None))
            continue
        if for_x:
            w = product.weight()
            grad_x = grad @ w if grad_x is None else grad_x.addmm_(grad, w)
        if a is None or b is None or inner is None:
            gradients.append(Gradients(None, None))
            continue
        grad_inner = (grad @ b.to(grad.dtype)).mul_(product.scale)
        grad_b = (grad.T @ inner).to(b.dtype).mul_(product.scale)
        narrow.append(_Narrow(len(gradients), product, a, grad_inner, trained))
        gradients.append(Gradients(None, grad_b))
    for group in _groups(narrow):
        _narrow_backward(group, x, grad_x, gradients)
    return grad_x, gradients


class _Narrow(NamedTuple):
    """The narrow products of a layer in the backward pass."""

    number: int  # of the layer
    product: LoraProduct
    a: Tensor
    grad_inner: Tensor  # [tokens, r]
    trained: bool


def _groups(narrow: list[_Narrow]) -> list[list[_Narrow]]:
    """Return the layers that are multiplied together: all without dropout, which have the same x."""
    together = [each for each in narrow if each.product.dropped is None]
    return [*([together] if together else []), *([each] for each in narrow if each.product.dropped is not None)]


def _narrow_backward(group: list[_Narrow], x: Tensor | None, grad_x: Tensor | None, gradients: list[Gradients]) -> None:
    """Set the gradients of A, and add to that of x in place, for layers whose x has the same elements dropped."""
    dropped = group[0].product.dropped
    wide = [each for each in group if each.trained]
    if x is not None and wide:
        # Mask x again: saving its masked copy in the forward pass would need more memory.
        of_a = _cat([each.grad_inner for each in wide], dim=1).T @ _without(x, dropped)
        for each, part in zip(wide, of_a.split([each.a.shape[0] for each in wide]), strict=True):
            gradients[each.number] = gradients[each.number]._replace(a=part.to(each.a.dtype))
    if grad_x is not None:
        grad_inner = _cat([each.grad_inner for each in group], dim=1)
        a = _cat([each.a for each in group], dim=0).to(grad_x.dtype)
        if dropped is None:
            grad_x.addmm_(grad_inner, a)
        else:
            grad_x.add_(_drop_(grad_inner @ a, dropped))


def _cat(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
