"""Save the adapter as a plain PEFT folder, and prove that whoever loads the folder has the trained model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import adalora, fp32_weights, gguf_base

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What a PEFT adapter file holds of the model, by PEFT's names, each tensor as it is to be saved."""
    # Embeddings are saved where they carry an adapter. PEFT's default would also look the base up on the hub, to see
    # whether the vocabulary was resized: what is new in it is saved as trained tokens.
    found = get_peft_model_state_dict(
        model, state_dict=fp32_weights.saved_state_dict(model), save_embedding_layers=False
    )
    return {name: tensor.detach() for name, tensor in found.items()}


def save_adapter(model: PeftModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Write the adapter into `folder` as PEFT does, naming the base as the recipe does."""
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = revision
    model.save_pretrained(str(folder), state_dict=fp32_weights.saved_state_dict(model), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's card is a form to fill in


def saved_names(model: PeftModel) -> dict[str, str | None]:
    """For each parameter of the adapter, the name under which `tensors` has it as it is; None where it has not.

    The adapter file does not hold a factor that was folded into another tensor, or what was pruned. Of parameters that
    are not trained, only those in the file are listed.
    """
    saved = {(t.data_ptr(), t.shape, t.dtype): name for name, t in adapter_tensors(model).items() if t.numel()}
    found = {name: (saved.get((p.data_ptr(), p.shape, p.dtype)), p) for name, p in model.named_parameters()}
    return {name: kept for name, (kept, p) in found.items() if kept is not None or p.requires_grad}


class Difference(NamedTuple):
    """Between a trained model and what plain PEFT makes of the saved folder."""

    tensors: float  # largest, over the adapter's tensors as written, and as loaded; infinite if one is missing
    logits: float  # largest, relative to the largest logit

    def is_none(self, dtype: torch.dtype) -> bool:
        """Whether it is the trained model: equal tensors, and logits that differ by no more than rounding in `dtype`.

        Logits are equal to the bit but for models whose kernels sum in an order that hangs on where their inputs lie.
        """
        return self.tensors == 0 and self.logits <= (1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5)


@torch.no_grad()
def difference_when_loaded(
    model: PeftModel, folder: Path, logits: Callable[[PeftModel], Tensor], arrange: Callable[[PeftModel], Any]
) -> Difference:
    """Load `folder` by PEFT onto the base, put it into the arithmetic of training, and compare with what was trained.

    The trained adapter is gone afterwards: its tensors are overwritten with NaN before the folder is loaded, so that
    one that the folder lacks cannot pass unseen.

    Args:
        model: the trained model.
        folder: what `save` wrote.
        logits: of some rows under a model.
        arrange: puts a loaded adapter into the arithmetic of training.

    Raises:
        LoraError: the folder's configuration is not the trained adapter's.
    """
    ours, theirs = model.peft_config[model.active_adapter].to_dict(), PeftConfig.from_pretrained(str(folder)).to_dict()
    # Set while saving, and of no effect on the weights.
    differ = [key for key in ours if key != "inference_mode" and _json_value(ours[key]) != _json_value(theirs.get(key))]
    if differ:
        raise LoraError(f"{folder}: adapter_config.json differs in {', '.join(differ)}", exit_code=1)
    expected = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    written = _max_difference(expected, load_file(folder / ADAPTER_WEIGHTS))
    reference = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(math.nan)
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        gguf_base.register_packed_lora(config)
    loaded = PeftModel.from_pretrained(_unwrap_base(model), str(folder), config=config)
    adalora.restore_fp32_tensors(loaded, load_file(folder / ADAPTER_WEIGHTS))
    arrange(loaded)
    found = adapter_tensors(loaded)
    # Modules that are trained whole are read into the base's dtype, which is what they were computed in.
    read = _max_difference({name: t.to(found[name].dtype) for name, t in expected.items() if name in found}, found)
    off = _max_difference(
        {"": reference / reference.abs().max().clamp_min(1e-12)}, {"": logits(loaded) / reference.abs().max()}
    )
    return Difference(max(written, read), off)


def _max_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        return math.inf
    pairs = [(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return math.inf
    # NaN is not less than anything: it has to be asked for by name.
    return max(
        (math.inf if (a - b).isnan().any() else float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0
    )


def _unwrap_base(model: PeftModel) -> PreTrainedModel:
    """The base as it was; PEFT's `unload` refuses some methods over quantised weights, and knows no virtual tokens."""
    fp32_weights.remove_parametrizations(model)
    base: PreTrainedModel = model.get_base_model()
    done: list[str] = []  # wrappers hold wrappers: the outermost gives way
    for name, module in list(base.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            base.set_submodule(name, inner)
            done.append(name)
    vars(base).pop("peft_config", None)  # virtual tokens leave none
    return base


def _json_value(value: Any) -> Any:
    """JSON has lists for sets and tuples."""
    return sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value
