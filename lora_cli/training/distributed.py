"""Data parallelism: all-reduce the adapter's gradients over processes, broadcast a fresh adapter."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lora_cli.model.fp32_weights import ConcatFrozen


def broadcast_adapter(model: nn.Module, accelerator: Accelerator) -> None:
    """Broadcast the adapter of the first process to all others, in place.

    An adapter that is initialized from a decomposition of the weights may differ between two GPUs, and afterwards
    only gradients are exchanged.
    """
    if accelerator.num_processes == 1:
        return
    constant = [module.constant for module in model.modules() if isinstance(module, ConcatFrozen)]
    for tensor in [*(p.data for p in model.parameters() if p.requires_grad), *constant]:
        broadcast(tensor, from_process=0)


def all_reduce_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Return the sum of `value` over all processes, in its shape and dtype."""
    reduced: Tensor = accelerator.reduce(value, reduction="sum")
    return reduced


def all_reduce_counts(accelerator: Accelerator, counts: tuple[int, ...]) -> list[int]:
    """Return the sums of some counts over all processes; with one process, without waiting for its device."""
    if accelerator.num_processes == 1:
        return list(counts)
    summed: list[int] = all_reduce_sum(accelerator, torch.tensor(counts, device=accelerator.device)).tolist()
    return summed


def all_reduce_gradients(trained: list[nn.Parameter], accelerator: Accelerator, *, share: float) -> None:
    """Sum the gradients of all processes in one message and divide them by `share`, in place.

    An adapter is small: one flat all-reduce costs less than DDP's buckets and hooks, and processes may have different
    numbers of batches, which DDP does not allow.
    """
    if accelerator.num_processes > 1:
        # Whether a parameter has a gradient can differ between processes: a missing one counts as zero.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        flat = all_reduce_sum(accelerator, flat)
        for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad.div_(share)


def any_process(accelerator: Accelerator, value: bool) -> bool:
    """Return whether `value` is True in any process; all processes must call it."""
    if accelerator.num_processes == 1:
        return value
    return bool(all_reduce_sum(accelerator, torch.tensor(int(value), device=accelerator.device)))


def max_of_processes(accelerator: Accelerator, value: int) -> int:
    """Return the largest `value` of all processes, which must all call it."""
    if accelerator.num_processes == 1:
        return value
    values = accelerator.gather(torch.tensor([value], device=accelerator.device))
    return int(values.max())
