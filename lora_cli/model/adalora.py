"""AdaLoRA rank allocation between optimizer steps: orthogonality loss, importance scores, pruning of components.

Zhang et al., arXiv:2303.10512. PEFT computes sensitivities and the budget; this module scores and masks the components,
for which PEFT would have the host wait for the GPU once a layer, and saves and restores the state.
"""

from itertools import islice
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor

from lora_cli.model.device import to_device

ADAPTER_NAME = "default"  # PEFT's name for the one adapter
SCORE_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names: sensitivity, its moving average, its uncertainty


class AdaLoraRankAllocator:
    """The rank allocator of one model, with scores that persist across steps."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._config: AdaLoraConfig = model.peft_config[ADAPTER_NAME]
        self._allocator: Any = model.base_model.rankallocator
        self._dropped: dict[str, Tensor] = {}  # components that are masked, bool [rank, 1], by the name of their E

    def orthogonality_loss(self) -> Tensor:
        """Return the weighted distance of A and B from orthogonality (section 3.1, equation 4): [] fp32.

        The caller adds it to the mean loss.
        """
        distances = []
        for name, parameter in self._model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        weighted: Tensor = self._config.orth_reg_weight * torch.stack(distances).mean()
        return weighted

    def update_and_allocate(self, number: int) -> None:
        """Score the components by the gradients of optimizer step `number` (from 1), and mask those over the budget."""
        end = self._config.total_step - self._config.tfinal
        if number < end:
            self._allocator.update_ipt(self._model.base_model.model)
        if number <= end:
            budget, is_due = self._allocator.budget_schedule(number)
            if is_due or number == end:
                self._allocate(budget)
        if number == end:
            self._allocator.reset_ipt()
        if number > end:
            self._dropped = self._dropped or self._dropped_by_pattern()
            self._mask()

    def _allocate(self, budget: int) -> None:
        """Keep the `budget` components of all layers with the highest scores (section 3.2, equations 7 to 10)."""
        factors = dict(self._model.base_model.model.named_parameters())
        scores = {}
        for name in factors:
            if ".lora_E." in name:
                a, b = (self._element_scores(name.replace("lora_E", kind)) for kind in ("lora_A", "lora_B"))
                scores[name] = self._element_scores(name).flatten() + (a.mean(dim=1) + b.mean(dim=0))
        every = torch.cat(list(scores.values()))
        dropped = every <= torch.kthvalue(every, self._allocator.init_bgt - budget).values
        ranks = [len(each) for each in scores.values()]
        self._dropped = {name: each[:, None] for name, each in zip(scores, dropped.split(ranks), strict=True)}
        self._mask()
        kept = iter((~dropped).tolist())  # one transfer for all layers
        self._config.rank_pattern = {name: list(islice(kept, rank)) for name, rank in zip(scores, ranks, strict=True)}

    def _element_scores(self, name: str) -> Tensor:
        scores: Tensor = self._allocator.exp_avg_ipt[name] * self._allocator.exp_avg_unc[name]
        return scores

    @torch.no_grad()
    def _mask(self) -> None:
        factors = dict(self._model.base_model.model.named_parameters())
        for name, dropped in self._dropped.items():
            factors[name].masked_fill_(dropped, 0.0)

    def _dropped_by_pattern(self) -> dict[str, Tensor]:
        """Return the masked components that the configuration of a resumed run names."""
        suffix = f".{ADAPTER_NAME}"
        # PEFT takes its name for the adapter out of the names when it saves them.
        pattern = {name.removesuffix(suffix) + suffix: kept for name, kept in self._config.rank_pattern.items()}
        factors = dict(self._model.base_model.model.named_parameters())
        return {
            name: to_device(~torch.tensor(kept, dtype=torch.bool)[:, None], factors[name].device)
            for name, kept in pattern.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scores, fp32 in their parameter's shape, and for each layer the kept components, bool [rank]."""
        scores = {f"{kind}|{name}": t for kind in SCORE_KINDS for name, t in getattr(self._allocator, kind).items()}
        pattern = self._config.rank_pattern or {}
        return scores | {f"kept|{name}": torch.tensor(kept, dtype=torch.bool) for name, kept in pattern.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the scores (fp32) and the kept components (bool [rank]) that `state_dict` returned."""
        device = next(self._model.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SCORE_KINDS, "kept")}
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            parts[kind][name] = tensor.to(device)
        for kind in SCORE_KINDS:
            setattr(self._allocator, kind, parts[kind])
        # Without kept components, the state is from before the first pruning.
        self._config.rank_pattern = {name: kept.tolist() for name, kept in parts["kept"].items()} or None
        self._dropped = {}

    def prune(self) -> None:
        """Remove the masked components from the layers, as PEFT removes them from the saved adapter.

        PEFT creates the smaller tensors in the base's dtype, which would round factors trained in fp32. So the tensors
        are selected here before PEFT resizes the layers.
        """
        if not self._config.rank_pattern:
            return
        base: Any = self._model.base_model
        pruned: dict[Any, list[Tensor]] = {}
        for name, components in self._config.rank_pattern.items():
            layer = base.model.get_submodule(name.partition(".lora_E")[0])
            mask = torch.as_tensor(components, dtype=torch.bool).flatten()
            a, b, e = (factors[ADAPTER_NAME].detach() for factors in (layer.lora_A, layer.lora_B, layer.lora_E))
            pruned[layer] = [a[mask], b[:, mask], e[mask]]
        base.resize_modules_by_rank_pattern(self._config.rank_pattern, ADAPTER_NAME)
        for layer, tensors in pruned.items():
            for factors, tensor in zip((layer.lora_A, layer.lora_B, layer.lora_E), tensors, strict=True):
                factors[ADAPTER_NAME].data = tensor


def restore_fp32_tensors(model: PeftModel, tensors: dict[str, Tensor], *, name: str = ADAPTER_NAME) -> None:
    """Replace the factors of a loaded AdaLoRA adapter by those of its file; do nothing for other methods.

    PEFT rounds them to the base's dtype when it loads them. `tensors` are A [rank, in], B [out, rank] and E [rank, 1],
    fp32, by their names in the file.
    """
    if not isinstance(model.peft_config[name], AdaLoraConfig):
        return
    for path, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A:
            for kind in ("lora_A", "lora_B", "lora_E"):
                parameter = getattr(layer, kind)[name]
                parameter.data = tensors[f"{path}.{kind}"].to(parameter.device)


def rank_allocator(model: PeftModel) -> AdaLoraRankAllocator | None:
    """Return the rank allocator of `model`; None unless its method is AdaLoRA."""
    return AdaLoraRankAllocator(model) if isinstance(model.peft_config.get(ADAPTER_NAME), AdaLoraConfig) else None
