"""What AdaLoRA does between gradient steps: keeps its factors orthogonal, scores components, drops the least important.

Zhang et al., arXiv:2303.10512. PEFT computes scores and budget; here they are driven, saved and restored.
"""

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor

NAME = "default"  # PEFT's name for the one adapter
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names: sensitivity, its mean, and its uncertainty


class Upkeep:
    """The rank allocator of one model. A class: its scores outlive a step."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._config: AdaLoraConfig = model.peft_config[NAME]
        self._allocator: Any = model.base_model.rankallocator

    def penalty(self) -> Tensor:
        """The weighted distance of A and B from orthogonal ones (section 3.1, equation 4), to add to the mean loss."""
        distances = []
        for name, parameter in self._model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        weighted: Tensor = self._config.orth_reg_weight * torch.stack(distances).mean()
        return weighted

    def after_step(self, number: int) -> None:
        """Score components by the gradients of optimizer step `number` (from 1), and mask those over the budget."""
        self._model.base_model.update_and_allocate(number)

    def state(self) -> dict[str, Tensor]:
        """The scores, and which components are left."""
        scores = {f"{kind}|{name}": t for kind in SCORES for name, t in getattr(self._allocator, kind).items()}
        pattern = self._config.rank_pattern or {}
        return scores | {f"kept|{name}": torch.tensor(kept, dtype=torch.bool) for name, kept in pattern.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        device = next(self._model.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SCORES, "kept")}
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            parts[kind][name] = tensor.to(device)
        for kind in SCORES:
            setattr(self._allocator, kind, parts[kind])
        if parts["kept"]:
            self._config.rank_pattern = {name: kept.tolist() for name, kept in parts["kept"].items()}

    def finish(self) -> None:
        """Leave the components that are masked out of the layers, as they are left out of what is saved."""
        if self._config.rank_pattern:
            self._model.base_model.resize_modules_by_rank_pattern(self._config.rank_pattern, NAME)


def upkeep(model: PeftModel) -> Upkeep | None:
    """What `model` needs between steps; None for all methods but AdaLoRA."""
    return Upkeep(model) if isinstance(model.peft_config.get(NAME), AdaLoraConfig) else None
