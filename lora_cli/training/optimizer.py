"""The optimizer: AdamW of torch or bitsandbytes (8-bit, paged), the choice of `auto`, and its state for checkpoints."""

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import TrainingSpec

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")


def choose_optimizer(name: str, *, device: torch.device, quantized: bool) -> str:
    """Return the optimizer for `training.optimizer`; auto is paged AdamW if the base is quantized, as in QLoRA.

    Raises:
        LoraError: a paged optimizer without a CUDA GPU, whose unified memory it needs.
    """
    if name == "auto":
        return "paged-adamw" if device.type == "cuda" and quantized else "adamw"
    if name.startswith("paged") and device.type != "cuda":
        raise LoraError(
            f"training.optimizer: {name} pages between a CUDA GPU and the host, but this run is on the {device.type}",
            hint=f"write {name.removeprefix('paged-')}, or auto",
        )
    return name


def moment_bytes(name: str) -> int:
    """Return the bytes per parameter of each of AdamW's two moments."""
    return 1 if name.endswith("8bit") else 4


def make_optimizer(
    model: nn.Module,
    spec: TrainingSpec,
    *,
    name: str = "adamw",
    lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """Create AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trainable fp32 parameters.

    The learning rate of each step is set by `lr_schedule.set_learning_rate`.

    Args:
        model: with the adapter.
        spec: learning rate, betas and weight decay.
        name: one of OPTIMIZERS. The 8-bit ones store their moments in 8 bits with one scale per 256 values (Dettmers et
            al., arXiv:2110.02861), and in 32 bits for tensors of less than 4,096 values. The paged ones can move their
            moments to the host when the GPU is full.
        lr_ratio: learning rate of the B matrices divided by that of the others, for LoRA+ (Hayou et al.,
            arXiv:2402.12354, section 4).
    """
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    b_matrices = [p for key, p in trainable if lr_ratio and ".lora_B." in key]
    others = [p for key, p in trainable if not (lr_ratio and ".lora_B." in key)]
    groups: list[dict[str, Any]] = [{"params": others, "ratio": 1.0}, {"params": b_matrices, "ratio": lr_ratio}]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": (spec.adam_beta1, spec.adam_beta2),
        "eps": 1e-8,
        "weight_decay": spec.weight_decay,
    }
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    optimizer_class = {
        "adamw-8bit": bitsandbytes.optim.AdamW8bit,
        "paged-adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged-adamw-8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state of one parameter for a checkpoint: its moments and its step count.

    Returns:
        Moments in the parameter's shape (fp32, or uint8 with fp32 block scales), and a scalar `step`. The quantization
        tables (`qmap`) are constants that all parameters share, and are left out.
    """
    own = {key: value for key, value in optimizer.state[parameter].items() if not key.startswith("qmap")}
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in own.items()}


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]
) -> None:
    """Load the state of one parameter, with the keys, shapes and dtypes that `optimizer_state` returns."""
    if isinstance(optimizer, torch.optim.AdamW):
        # torch's fused kernel needs its step count on the parameter's device.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        return
    indices = (
        (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, p in enumerate(group["params"])
        if p is parameter
    )
    group_index, index = next(indices)
    bnb_optimizer: Any = optimizer
    # bitsandbytes allocates the state itself, paged tensors included, and keeps the step count as a number.
    bnb_optimizer.check_overrides()
    bnb_optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)
    for key, value in state.items():
        current = optimizer.state[parameter][key]
        if isinstance(current, Tensor):
            current.copy_(value)
        else:
            optimizer.state[parameter][key] = int(value)
