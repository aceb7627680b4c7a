"""The learning rate schedule: linear warmup, then constant, linear, cosine (with restarts), or warmup-stable-decay."""

import math

import torch

from lora_cli.errors import LoraError
from lora_cli.recipe.training_section import TrainingSpec


def warmup_steps(warmup: float, total: int) -> int:
    """Return the warmup steps of a run of `total` steps: `warmup` is a fraction if below 1, else a number of steps."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def decay_steps(spec: TrainingSpec, total: int) -> int:
    """Return the steps of wsd's decay: `spec.decay` is a fraction if below 1, else a number of steps."""
    assert spec.decay is not None, "the schema fills it in"
    if spec.decay >= 1:
        return int(spec.decay)
    # Both fractions are rounded up, so together they may be a step too many.
    return max(0, min(math.ceil(spec.decay * total), total - warmup_steps(spec.warmup, total)))


def check_schedule_fits(spec: TrainingSpec, total: int) -> None:
    """Check what the recipe's rules cannot when the number of steps follows from the rows.

    Raises:
        LoraError: the decay does not fit into a run of `total` steps.
    """
    if spec.schedule != "wsd":
        return
    warmup, decay = warmup_steps(spec.warmup, total), decay_steps(spec, total)
    if warmup + decay > total:
        plus = f" and {warmup:,} of warmup" if warmup else ""
        raise LoraError(
            f"training.decay: {decay:,} steps of decay{plus} are more than the {total:,} steps of this run",
            hint="write fewer, or a fraction such as 0.1",
        )


def describe_schedule(spec: TrainingSpec, total: int) -> list[str]:
    """Return lines on a schedule whose parts the recipe does not show, and on a warmup longer than the run."""
    warmup = warmup_steps(spec.warmup, total)
    if warmup > total:
        reached = learning_rate(total - 1, spec=spec, total=total)
        return [
            f"note: the warmup of {warmup:,} steps is longer than the run: the learning rate ends at {reached:.2g}, "
            f"and never reaches {spec.learning_rate:g}"
        ]
    if spec.schedule == "wsd":
        decay = decay_steps(spec, total)
        stable = total - warmup - decay
        return [f"learning rate: {warmup:,} steps of warmup, {stable:,} stable, {decay:,} of decay"]
    if spec.schedule == "cosine-with-restarts":
        return [
            f"learning rate: {warmup:,} steps of warmup, then {spec.cycles} cosine cycles in {total - warmup:,} steps"
        ]
    return []


def learning_rate(step: int, *, spec: TrainingSpec, total: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`.

    A decay goes from `spec.learning_rate` to `spec.min_learning_rate`, which it would reach at step `total`, one after
    the last. Warmup starts above 0, at step 0. The decay of wsd is linear: Hägele et al., arXiv:2405.18392, section 3;
    restarts: Loshchilov & Hutter, arXiv:1608.03983, equation 5, with cycles of equal length.
    """
    warmup = warmup_steps(spec.warmup, total)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match spec.schedule:
        case "constant":
            return spec.learning_rate
        case "linear":
            share = 1 - progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine-with-restarts":
            assert spec.cycles is not None, "the schema fills it in"
            share = 0.5 * (1 + math.cos(math.pi * (spec.cycles * progress % 1)))
        case "wsd":
            share = min(1.0, (total - step) / max(1, decay_steps(spec, total)))
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate for the next step: `rate` times the `ratio` of each parameter group (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)
