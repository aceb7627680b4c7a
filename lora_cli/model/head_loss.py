"""Output head and cross-entropy in one step, over a few hundred tokens at a time, with gradients made on the way.

The [tokens, vocabulary] logits, often the largest tensor of a training step, never exist in full. A plain frozen head
has a formula for its gradient, which overwrites the logits; any other head (adapted, with a cap or a factor) goes
through autograd, one chunk after the other.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

CHUNK_TOKENS = 256  # supervised tokens whose logits exist at the same time, on the CPU; the least elsewhere
GPU_CHUNK_BYTES = 256 << 20  # of fp32 logits: products of fewer tokens leave a GPU idle

# What models do to the logits of their head, by the key of their config.
LOGIT_KEYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2 to 4
    "logits_scaling": lambda logits, factor: logits / factor,  # Granite
    "logit_scale": lambda logits, factor: logits * factor,  # Cohere
    "lm_head_multiplier": lambda logits, factor: logits * factor,  # Falcon-H1
}


def logit_functions(config: PretrainedConfig) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what a model of `config` may do to the logits of its head; one of them is tried on the model."""
    text = config.get_text_config()
    for key, function in LOGIT_KEYS.items():
        value = getattr(text, key, None)
        if isinstance(value, (int, float)) and value:
            yield lambda logits, function=function, value=value: function(logits, value)  # type: ignore[misc]
    yield lambda logits: logits


def leaves_of(output: Tensor) -> tuple[Tensor, ...]:
    """Return the parameters that `output` depends on in its autograd graph, each once."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return tuple(found.values())


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the supervised tokens whose logits, over `vocabulary` ids, exist at the same time on `device`."""
    return CHUNK_TOKENS if device.type == "cpu" else max(CHUNK_TOKENS, GPU_CHUNK_BYTES // (4 * vocabulary))


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head, with d loss/d hidden = (softmax(logits) - target)·W per chunk.

    `target` is one-hot; with label smoothing e, (1 - e)·onehot + e/V (Szegedy et al., arXiv:1512.00567, section 7).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, an fp32 scalar (fp64 for fp64 inputs), and the correct predictions, an int64 scalar.

        Args:
            ctx: of autograd.
            hidden: [n, h], in the compute dtype.
            weight: [V, h], in the compute dtype.
            bias: [V], in the compute dtype, or None.
            targets: int64 [n].
            smoothing: of labels, 0 to 1.
        """
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(hidden[part], weight, bias).to(precise)
            target = targets[part, None]
            picked = logits.gather(1, target)
            top, best = logits.max(dim=1, keepdim=True)
            correct += (best == target).sum()
            # The expected logit under the target distribution: the loss is log-sum-exp minus this.
            expected = (
                picked if not smoothing else (1 - smoothing) * picked + smoothing * logits.mean(dim=1, keepdim=True)
            )
            # One exponential serves both the sum and the gradient: softmax = exp(z - max) / sum.
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + top - expected).sum()
            if grad is not None:
                weights.div_(total)
                if smoothing:
                    weights.sub_(smoothing / weights.shape[1])
                weights.scatter_add_(1, target, torch.full_like(picked, smoothing - 1.0))
                grad[part] = weights.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient [n, h] of `hidden`, in its dtype; `grad_loss` is the scalar factor of the summed loss."""
        (grad,) = ctx.saved_tensors
        # A 0-dim fp32 factor: the product is computed in fp32; a bf16 factor would be wrong by up to 0.4 %.
        return grad * grad_loss, None, None, None, None


class ChunkedHeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of any head, chunk by chunk: each chunk's gradients are computed with its loss.

    Nothing of a chunk but its gradients is kept, and nothing is computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        vocabulary: int,
        smoothing: float,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, an fp32 scalar (fp64 for fp64 inputs), and the correct predictions, an int64 scalar.

        Args:
            ctx: of autograd.
            hidden: [n, h], in the compute dtype.
            targets: int64 [n].
            head: returns the logits [m, V] of hidden states [m, h].
            vocabulary: V.
            smoothing: of labels, 0 to 1.
            trained: the parameters that the logits depend on.
        """
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        needed = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:])
        grad = torch.zeros_like(hidden) if needed else None
        sums: list[Tensor | None] = [None] * len(trained)
        size = chunk_tokens(vocabulary, hidden.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            chunk = hidden[part].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                logits = head(chunk)
                chunk_loss = nn.functional.cross_entropy(
                    logits.to(precise), targets[part], reduction="sum", label_smoothing=smoothing
                )
            correct += (logits.detach().argmax(-1) == targets[part]).sum()
            loss += chunk_loss.detach()
            if grad is not None:
                first, *others = torch.autograd.grad(chunk_loss, [chunk, *trained], allow_unused=True)
                grad[part] = first
                sums = [_add(total, other) for total, other in zip(sums, others, strict=True)]
        ctx.save_for_backward(grad, *sums)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `hidden` and of `trained`; `grad_loss` is the scalar factor of the summed loss."""
        grad, *sums = ctx.saved_tensors
        # In place: those of a fully trained head are as large as the head.
        scaled = (total if total is None else total.mul_(grad_loss) for total in sums)
        return grad * grad_loss, None, None, None, None, *scaled


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)
