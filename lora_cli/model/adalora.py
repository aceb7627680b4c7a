"""What AdaLoRA does between gradient steps: keeps its factors orthogonal, scores components, drops the least important.

Zhang et al., arXiv:2303.10512. PEFT computes scores and budget; here they are driven, saved and restored.
"""

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor

ADAPTER_NAME = "default"  # PEFT's name for the one adapter
SCORE_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names: sensitivity, its mean, and its uncertainty


class AdaLoraRankAllocator:
    """The rank allocator of one model. A class: its scores outlive a step."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._config: AdaLoraConfig = model.peft_config[ADAPTER_NAME]
        self._allocator: Any = model.base_model.rankallocator

    def orthogonality_loss(self) -> Tensor:
        """The weighted distance of A and B from orthogonal ones (section 3.1, equation 4), to add to the mean loss."""
        distances = []
        for name, parameter in self._model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        weighted: Tensor = self._config.orth_reg_weight * torch.stack(distances).mean()
        return weighted

    def update_and_allocate(self, number: int) -> None:
        """Score components by the gradients of optimizer step `number` (from 1), and mask those over the budget."""
        self._model.base_model.update_and_allocate(number)

    def state_dict(self) -> dict[str, Tensor]:
        """The scores, and which components are left."""
        scores = {f"{kind}|{name}": t for kind in SCORE_KINDS for name, t in getattr(self._allocator, kind).items()}
        pattern = self._config.rank_pattern or {}
        return scores | {f"kept|{name}": torch.tensor(kept, dtype=torch.bool) for name, kept in pattern.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        device = next(self._model.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SCORE_KINDS, "kept")}
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            parts[kind][name] = tensor.to(device)
        for kind in SCORE_KINDS:
            setattr(self._allocator, kind, parts[kind])
        if parts["kept"]:
            self._config.rank_pattern = {name: kept.tolist() for name, kept in parts["kept"].items()}

    def prune(self) -> None:
        """Leave the components that are masked out of the layers, as they are left out of what is saved.

        PEFT makes the smaller tensors in the dtype of the base, which would round what was trained in fp32.
        """
        if not self._config.rank_pattern:
            return
        base: Any = self._model.base_model
        kept: dict[Any, list[Tensor]] = {}
        for name, components in self._config.rank_pattern.items():
            layer = base.model.get_submodule(name.partition(".lora_E")[0])
            chosen = torch.as_tensor(components, dtype=torch.bool).flatten()
            a, b, e = (part[ADAPTER_NAME].detach() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
            kept[layer] = [a[chosen], b[:, chosen], e[chosen]]
        base.resize_modules_by_rank_pattern(self._config.rank_pattern, ADAPTER_NAME)
        for layer, tensors in kept.items():
            for part, tensor in zip((layer.lora_A, layer.lora_B, layer.lora_E), tensors, strict=True):
                part[ADAPTER_NAME].data = tensor


def restore_fp32_tensors(model: PeftModel, tensors: dict[str, Tensor], *, name: str = ADAPTER_NAME) -> None:
    """Give a loaded AdaLoRA adapter the tensors of its file: PEFT rounds them to the base's dtype as it loads them."""
    if not isinstance(model.peft_config[name], AdaLoraConfig):
        return
    for path, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A:
            for kind in ("lora_A", "lora_B", "lora_E"):
                held = getattr(layer, kind)[name]
                held.data = tensors[f"{path}.{kind}"].to(held.device)


def rank_allocator(model: PeftModel) -> AdaLoraRankAllocator | None:
    """What `model` needs between steps; None for all methods but AdaLoRA."""
    return AdaLoraRankAllocator(model) if isinstance(model.peft_config.get(ADAPTER_NAME), AdaLoraConfig) else None
