"""Tiny models on a device, plain or in NF4, and short runs of the training loop: what the GPU laws share."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training.loop import Step, fit
from lora_cli.training.memory_ladder import MemoryLadder, Rung
from tests.model import zoo
from tests.support import checkpoints

LENGTHS = [3, 9, 30, 12, 7, 5, 21, 14, 2, 33]
SPEC = TrainingSpec(learning_rate=1e-2, warmup=0)


def make_plan(*, packing: bool = True) -> BatchPlan:
    """Return a plan of two batches a step, of 40 tokens with packing, else of 4 rows."""
    return BatchPlan(zoo.rows_of(LENGTHS), packing=packing, size=40 if packing else 4, batches_per_step=2, seed=1)


def make_model(
    device: torch.device, *, attention: str, dtype: torch.dtype = torch.float32, family: str = "llama", **spec: Any
) -> PeftModel:
    """Return a tiny model with a changed adapter on `device`, trained parameters in fp32."""
    model = zoo.adapted(zoo.make(family, dtype=dtype, attention=attention), **spec).to(device)
    upcast_trainable_params(model)
    return model


def load_base(folder: Path, device: torch.device, *, dtype: torch.dtype, **section: Any) -> PreTrainedModel:
    """Load the model in `folder` onto `device` as the product does, in NF4 if `section` has keys of `quantization`."""
    spec = QuantizationSpec.model_validate(section) if section else None
    return checkpoints.checkpoint(folder).load(device, dtype=dtype, quantization=spec).model


@torch.no_grad()
def adapt(base: PreTrainedModel, **spec: Any) -> PeftModel:
    """Attach an adapter to `base`, on any device, with random B: a fresh one would not change the outputs."""
    model = zoo.attached(base, **spec)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    upcast_trainable_params(model)
    return model


def make_ladder(model: PeftModel, plan: BatchPlan, rung: Rung) -> MemoryLadder:
    """Return a ladder on `rung`."""
    ladder = MemoryLadder(
        model.get_base_model(),
        setting="auto",
        can_recompute=True,
        use_reentrant=False,
        max_parts=plan.max_rows,
        reserve=0,
        info=lambda line: None,
    )
    ladder.set(rung)
    return ladder


def train(
    model: PeftModel, plan: BatchPlan, accelerator: Accelerator, *, total: int = 3, ladder: MemoryLadder | None = None
) -> list[Step]:
    """Take `total` steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    steps = fit(model, plan, spec=SPEC, optimizer=optimizer, accelerator=accelerator, total=total, ladder=ladder)
    return list(steps)


def trained(model: PeftModel) -> list[Tensor]:
    """Return copies of the trained parameters."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def error(found: Tensor, exact: Tensor) -> float:
    """Return the L2 norm of the difference of `found` and `exact`, relative to that of `exact`."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
