"""The optimizers of torch, bitsandbytes (8-bit, paged) and transformers, the choice of `auto`, and their state."""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import Adafactor

from lora_cli.errors import LoraError
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training.muon import MuonWithAdamW, is_matrix, make_muon
from lora_cli.training.schedule_free import ScheduleFreeAdamW

BITSANDBYTES: dict[str, type[Any]] = {
    "adamw-8bit": bitsandbytes.optim.AdamW8bit,
    "paged-adamw": bitsandbytes.optim.PagedAdamW32bit,
    "paged-adamw-8bit": bitsandbytes.optim.PagedAdamW8bit,
    "lion": bitsandbytes.optim.Lion32bit,
    "lion-8bit": bitsandbytes.optim.Lion8bit,
    "paged-lion": bitsandbytes.optim.PagedLion32bit,
    "paged-lion-8bit": bitsandbytes.optim.PagedLion8bit,
}
OPTIMIZERS = ("adamw", *BITSANDBYTES, "adafactor", "muon", "schedule-free-adamw")
MIN_8BIT_VALUES, VALUES_PER_SCALE = 4096, 256  # bitsandbytes: smaller tensors stay in 32 bits; values per fp32 scale
MANAGED_MEMORY = 83  # CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY of the CUDA driver
LION_BETAS = (0.9, 0.99)  # Chen et al., arXiv:2302.06675, section 4.1
TRAINING_WEIGHTS = "training_weights"  # key in the state of schedule-free optimizers, whose adapter is an average


def choose_optimizer(name: str, *, device: torch.device) -> str:
    """Return the optimizer for `training.optimizer`; auto is AdamW: the moments of an adapter are small.

    Raises:
        LoraError: a paged optimizer without a CUDA GPU, whose unified memory it needs, or on one that has none.
    """
    if name == "auto":
        return "adamw"
    if name.startswith("paged") and device.type == "cuda" and not has_unified_memory(device.index or 0):
        raise LoraError(
            f"training.optimizer: {name} needs unified memory, which this GPU does not have",
            hint=f"write {name.removeprefix('paged-')}, or auto",
        )
    if name.startswith("paged") and device.type != "cuda":
        raise LoraError(
            f"training.optimizer: {name} pages between a CUDA GPU and the host, but this run is on the {device.type}",
            hint=f"write {name.removeprefix('paged-')}, or auto",
        )
    return name


def has_unified_memory(index: int) -> bool:
    """Return whether the GPU `index` allocates memory that moves to the host; virtual GPUs do not.

    The driver is asked: bitsandbytes ends the process where the allocation fails.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True  # not known
    value = ctypes.c_int(1)
    if not driver.cuInit(0):
        driver.cuDeviceGetAttribute(ctypes.byref(value), MANAGED_MEMORY, index)
    return bool(value.value)


def state_bytes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of the optimizer's state for trained parameters of these shapes, by name.

    Two moments for AdamW, one for Lion and Muon, a row and a column of second moments for Adafactor; schedule-free
    AdamW stores a second moment and a second copy of the weights. Scalars are not counted.
    """
    return sum(_state_bytes(name, parameter, shape) for parameter, shape in shapes.items())


def _state_bytes(name: str, parameter: str, shape: tuple[int, ...]) -> int:
    values = prod(shape)
    if name == "adafactor" and len(shape) > 1:
        return 4 * (values // shape[-1] + values // shape[-2])
    if name == "muon":
        matrix = is_matrix(parameter, nn.Parameter(torch.empty(shape, device="meta")))
        return 4 * values * (1 if matrix else 2)
    moments = 1 if "lion" in name or name == "adafactor" else 2
    if name.endswith("8bit") and values >= MIN_8BIT_VALUES:
        return moments * (values + 4 * ceil(values / VALUES_PER_SCALE))
    return moments * 4 * values


def trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained parameters, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(
    model: nn.Module,
    spec: TrainingSpec,
    *,
    name: str = "adamw",
    lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """Create an optimizer over the trainable fp32 parameters.

    The learning rate of each step is set by `lr_schedule.set_learning_rate`. Sources: AdamW, Loshchilov & Hutter,
    arXiv:1711.05101; Lion, Chen et al., arXiv:2302.06675; Adafactor, Shazeer & Stern, arXiv:1804.04235, with the
    recipe's learning rate instead of its relative one, which would start B from 1e-3 of it; see muon.py and
    schedule_free.py for the others.

    Args:
        model: with the adapter.
        spec: learning rate, betas and weight decay.
        name: one of OPTIMIZERS. The 8-bit ones store their moments in 8 bits with one scale per 256 values (Dettmers et
            al., arXiv:2110.02861), and in 32 bits for tensors of less than 4,096 values. The paged ones can move their
            moments to the host when the GPU is full.
        lr_ratio: learning rate of the B matrices divided by that of the others, for LoRA+ (Hayou et al.,
            arXiv:2402.12354, section 4).

    Raises:
        LoraError: muon, but the adapter has no matrices.
    """
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, p in trainable:
        ratio = lr_ratio if lr_ratio and ".lora_B." in key else 1.0
        grouped.setdefault((ratio, name == "muon" and is_matrix(key, p)), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": grouped[key], "ratio": key[0], "matrices": key[1]} for key in sorted(grouped)
    ]
    options: dict[str, Any] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    adam = {**options, "betas": (spec.adam_beta1, spec.adam_beta2), "eps": 1e-8}
    if name == "muon":
        if not any(group["matrices"] for group in groups):
            raise LoraError(
                "training.optimizer: muon trains matrices, and this adapter has none",
                hint="write optimizer: adamw, or adapter.method: lora",
            )
        return make_muon(groups, **adam)
    for group in groups:
        del group["matrices"]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if name == "schedule-free-adamw":
        return ScheduleFreeAdamW(groups, **adam)
    if name == "adafactor":
        adafactor: torch.optim.Optimizer = Adafactor(groups, scale_parameter=False, relative_step=False, **options)
        return adafactor
    if "lion" in name:
        adam = {**options, "betas": LION_BETAS}
    optimizer: torch.optim.Optimizer = BITSANDBYTES[name](groups, **adam)
    return optimizer


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, the parameters are those to evaluate and save: with a schedule-free optimizer, the average."""
    if isinstance(optimizer, ScheduleFreeAdamW):
        with optimizer.averaged_weights():
            yield
    else:
        yield


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state of one parameter for a checkpoint: its moments and its step count.

    Returns:
        Moments (fp32, or uint8 with fp32 block scales) and scalars, such as `step`. The quantization tables (`qmap`)
        are constants that all parameters share, and are left out. Of a schedule-free optimizer, the training weights
        too, in the parameter's shape.
    """
    part = optimizer.part_of(parameter) if isinstance(optimizer, MuonWithAdamW) else optimizer
    own = {key: value for key, value in part.state[parameter].items() if not key.startswith("qmap")}
    if isinstance(part, ScheduleFreeAdamW) and own:
        own[TRAINING_WEIGHTS] = part.training_weights(parameter)
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in own.items()}


@torch.no_grad()
def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]
) -> None:
    """Load the state of one parameter, with the keys, shapes and dtypes that `optimizer_state` returns.

    A schedule-free optimizer also sets the parameter to its training weights.
    """
    part = optimizer.part_of(parameter) if isinstance(optimizer, MuonWithAdamW) else optimizer
    if isinstance(part, bitsandbytes.optim.optimizer.Optimizer8bit):
        _restore_bitsandbytes_state(part, parameter, state)
        return
    if isinstance(part, ScheduleFreeAdamW):
        parameter.copy_(state[TRAINING_WEIGHTS])
        state = {key: value for key, value in state.items() if key != TRAINING_WEIGHTS}
    if isinstance(part, Adafactor):
        part.state[parameter] = {key: _number_or_tensor(key, value, parameter) for key, value in state.items()}
        return
    # torch's fused AdamW needs its step count on the parameter's device; schedule-free AdamW reads it on the host.
    host = isinstance(part, ScheduleFreeAdamW)
    part.state[parameter] = {
        key: value if host and value.ndim == 0 else value.to(parameter.device) for key, value in state.items()
    }


def _number_or_tensor(key: str, value: Tensor, parameter: nn.Parameter) -> int | Tensor:
    return int(value) if key == "step" else value.to(parameter.device)


def _restore_bitsandbytes_state(optimizer: Any, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Load the state into tensors that bitsandbytes allocates itself, paged ones included; its step is a number."""
    indices = (
        (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, p in enumerate(group["params"])
        if p is parameter
    )
    group_index, index = next(indices)
    optimizer.check_overrides()
    optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)
    for key, value in state.items():
        current = optimizer.state[parameter][key]
        if isinstance(current, Tensor):
            current.copy_(value)
        else:
            optimizer.state[parameter][key] = int(value)
