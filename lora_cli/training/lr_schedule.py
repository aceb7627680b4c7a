"""The learning rate schedule: linear warmup, then constant, linear or cosine decay."""

import math

import torch

from lora_cli.recipe.schema import TrainingSpec


def warmup_steps(warmup: float, total: int) -> int:
    """Return the warmup steps of a run of `total` steps: `warmup` is a fraction if below 1, else a number of steps."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate(step: int, *, spec: TrainingSpec, total: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`.

    Linear and cosine decay would reach 0 at step `total`, one after the last. Warmup starts above 0, at step 0.
    """
    warmup = warmup_steps(spec.warmup, total)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if spec.schedule == "constant":
        return spec.learning_rate
    if spec.schedule == "linear":
        return spec.learning_rate * (1 - progress)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate for the next step: `rate` times the `ratio` of each parameter group (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)
