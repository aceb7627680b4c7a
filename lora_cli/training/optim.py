"""The optimizer and the learning rate of each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from lora_cli.recipe.schema import TrainingSpec


def make_optimizer(parameters: Iterable[nn.Parameter], spec: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trainable fp32 parameters; the rate is set per step."""
    return torch.optim.AdamW(
        list(parameters), lr=spec.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=spec.weight_decay
    )


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warmup in a run of `total` steps: `warmup` is a fraction if below 1, else a number of steps."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate(step: int, *, spec: TrainingSpec, total: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total`: linear warmup, then the schedule, at 0 after the last."""
    warmup = warmup_steps(spec.warmup, total)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if spec.schedule == "constant":
        return spec.learning_rate
    if spec.schedule == "linear":
        return spec.learning_rate * (1 - progress)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
