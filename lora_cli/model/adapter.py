"""Put the adapter on the base, count it, save it as a plain PEFT folder, and prove that the folder is the model."""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import targets
from lora_cli.recipe.schema import AdapterSpec, MethodName

Method = Callable[[AdapterSpec, str | list[str]], LoraConfig]


def _lora(spec: AdapterSpec, modules: str | list[str], **options: bool) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=modules,
        bias=spec.bias,
        task_type="CAUSAL_LM",
        **options,
    )


def _rslora(spec: AdapterSpec, modules: str | list[str]) -> LoraConfig:
    return _lora(spec, modules, use_rslora=True)  # Kalajdzievski, arXiv:2312.03732: alpha/sqrt(rank)


def _dora(spec: AdapterSpec, modules: str | list[str]) -> LoraConfig:
    return _lora(spec, modules, use_dora=True)  # Liu et al., arXiv:2402.09353: magnitude and direction apart


METHODS: dict[MethodName, Method] = {"lora": _lora, "rslora": _rslora, "dora": _dora}


def attach(model: PreTrainedModel, spec: AdapterSpec, *, seed: int) -> PeftModel:
    """Freeze `model` and add the trainable adapter that `spec` describes; A is drawn from `seed`, B is zero.

    Raises:
        LoraError: target modules that match no layer, or a kind of layer that the method cannot adapt.
    """
    config = METHODS[spec.method](spec, targets.resolve(model, spec.target_modules))
    torch.manual_seed(seed)
    try:
        # fp32 master weights: AdamW's small updates would be rounded away in bf16.
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as reason:
        first = str(reason).splitlines()[0]
        hint = "choose other adapter.target_modules or another adapter.method"
        if "lora_dropout" in first:  # experts whose weights are one parameter
            hint = "set adapter.dropout: 0, or choose other adapter.target_modules"
        raise LoraError(f"adapter: PEFT refuses it: {first}", hint=hint) from reason


def adapted_layers(model: PeftModel) -> dict[str, int]:
    """Full name of each layer that carries the adapter, as in the base model → its trainable parameters."""
    counts: Counter[str] = Counter()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            # Experts with two adapted parameters are a wrapper in a wrapper: one layer, each parameter counted once.
            inner = (m for m in module.modules() if m is not module and isinstance(m, BaseTunerLayer))
            others = {id(p) for m in inner for p in m.parameters()}
            own = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in others)
            counts[re.sub(r"(\.base_layer)+$", "", name)] += own
    return dict(counts)


def coverage(model: PeftModel, layers: dict[str, torch.nn.Module]) -> list[targets.Coverage]:
    """How much of each kind of the base's linear `layers` (taken before `attach`) carries the adapter."""
    return targets.coverage(layers, adapted_layers(model))


def save(model: PeftModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Write the adapter into `folder` (a new one) as PEFT does, naming the base as the recipe does."""
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = revision
    # Embeddings are saved where they carry an adapter. PEFT's default would also look the base up on the hub, to
    # see whether the vocabulary was resized, which nothing here does.
    model.save_pretrained(str(folder), save_embedding_layers=False)


@torch.no_grad()
def reload_difference(model: PeftModel, folder: Path, logits: Callable[[], Tensor]) -> float:
    """Load `folder` into the trained model; largest difference that makes to tensors and to `logits()`. Must be 0.

    The trained tensors are overwritten with NaN first, so that one that the folder lacks cannot pass unseen, and
    put back afterwards.

    Raises:
        LoraError: the folder's configuration is not the trained adapter's.
    """
    ours, theirs = model.peft_config[model.active_adapter].to_dict(), PeftConfig.from_pretrained(str(folder)).to_dict()
    # Set while saving, and of no effect on the weights.
    differ = [key for key in ours if key != "inference_mode" and ours[key] != theirs.get(key)]
    if differ:
        raise LoraError(f"{folder}: adapter_config.json differs in {', '.join(differ)}", exit_code=1)
    reference = logits()
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [p.clone() for p in trained]
    try:
        for parameter in trained:
            parameter.fill_(math.nan)
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        pairs = [(logits(), reference), *zip(trained, copies, strict=True)]
        # NaN is not less than anything: it has to be asked for by name.
        return max(math.inf if (a - b).isnan().any() else float((a - b).abs().max()) for a, b in pairs)
    finally:
        for parameter, copy in zip(trained, copies, strict=True):
            parameter.copy_(copy)
