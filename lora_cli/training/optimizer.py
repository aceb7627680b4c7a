"""The optimizer: AdamW of torch or bitsandbytes, its state in checkpoints, and what `auto` chooses."""

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import TrainingSpec

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")  # what auto chooses from


def choose_optimizer(name: str, *, device: torch.device, quantized: bool) -> str:
    """The optimizer that `training.optimizer` stands for here; auto pages over a quantised base, as QLoRA does.

    Raises:
        LoraError: paged, on a machine that has no unified memory to page to.
    """
    if name == "auto":
        return "paged-adamw" if device.type == "cuda" and quantized else "adamw"
    if name.startswith("paged") and device.type != "cuda":
        raise LoraError(
            f"training.optimizer: {name} pages between a CUDA GPU and the host, and this run is on the {device.type}",
            hint=f"write {name.removeprefix('paged-')}, or auto",
        )
    return name


def moment_bytes(name: str) -> int:
    """Bytes that each of AdamW's two moments takes for a parameter."""
    return 1 if name.endswith("8bit") else 4


def make_optimizer(
    model: nn.Module,
    spec: TrainingSpec,
    *,
    name: str = "adamw",
    lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trained fp32 parameters; the rate is set per step.

    Args:
        model: what is trained.
        spec: rates, betas and decay.
        name: one of OPTIMIZERS. The 8-bit ones hold their moments in 8 bits with a scale for 256 values (Dettmers et
            al., arXiv:2110.02861); of tensors below 4,096 values in 32. The paged ones may leave a full GPU.
        lr_ratio: LoRA+: how many times the rate of A the one of B is (Hayou et al., arXiv:2402.12354, section 4).
    """
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    faster = [p for key, p in named if lr_ratio and ".lora_B." in key]
    others = [p for key, p in named if not (lr_ratio and ".lora_B." in key)]
    groups: list[dict[str, Any]] = [{"params": others, "ratio": 1.0}, {"params": faster, "ratio": lr_ratio}]
    groups = [group for group in groups if group["params"]]
    shared: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": (spec.adam_beta1, spec.adam_beta2),
        "eps": 1e-8,
        "weight_decay": spec.weight_decay,
    }
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **shared)
    kind = {
        "adamw-8bit": bitsandbytes.optim.AdamW8bit,
        "paged-adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged-adamw-8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]
    optimizer: torch.optim.Optimizer = kind(groups, **shared)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The moments of one parameter, and its count of steps; tables that all parameters share are left out."""
    found = {key: value for key, value in optimizer.state[parameter].items() if not key.startswith("qmap")}
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in found.items()}


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Put back what `state_of` gave."""
    if isinstance(optimizer, torch.optim.AdamW):
        # torch's fused kernel wants its count where the parameter is.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        return
    places = (
        (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p is parameter
    )
    group, index = next(places)
    lib: Any = optimizer
    # It makes its own tensors, paged ones among them, and keeps the count as a number.
    lib.check_overrides()
    lib.init_state(optimizer.param_groups[group], parameter, group, index)
    for key, value in state.items():
        held = optimizer.state[parameter][key]
        if isinstance(held, Tensor):
            held.copy_(value)
        else:
            optimizer.state[parameter][key] = int(value)
