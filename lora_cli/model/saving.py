"""Save the adapter as a plain PEFT folder, and prove that whoever loads the folder has the trained model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model import held

WEIGHTS = "adapter_model.safetensors"


def tensors(model: PeftModel) -> dict[str, Tensor]:
    """What a PEFT adapter file holds of the model, by PEFT's names, each tensor as it is to be saved."""
    # Embeddings are saved where they carry an adapter. PEFT's default would also look the base up on the hub, to see
    # whether the vocabulary was resized: what is new in it is saved as trained tokens.
    found = get_peft_model_state_dict(model, state_dict=held.state_as_saved(model), save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in found.items()}


def save(model: PeftModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Write the adapter into `folder` as PEFT does, naming the base as the recipe does."""
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = revision
    model.save_pretrained(str(folder), state_dict=held.state_as_saved(model), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's card is a form to fill in


def kept_in(model: PeftModel) -> dict[str, str | None]:
    """For each parameter of the adapter, the name under which `tensors` has it as it is; None where it has not.

    The adapter file does not hold a factor that was folded into another tensor, or what was pruned. Of parameters that
    are not trained, only those in the file are listed.
    """
    saved = {(t.data_ptr(), t.shape, t.dtype): name for name, t in tensors(model).items() if t.numel()}
    found = {name: (saved.get((p.data_ptr(), p.shape, p.dtype)), p) for name, p in model.named_parameters()}
    return {name: kept for name, (kept, p) in found.items() if kept is not None or p.requires_grad}


@torch.no_grad()
def difference_when_loaded(
    model: PeftModel, folder: Path, logits: Callable[[PeftModel], Tensor], arrange: Callable[[PeftModel], Any]
) -> float:
    """Load `folder` by plain PEFT onto the base; largest difference to what was trained, in tensors and logits: 0.

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
    differ = [key for key in ours if key != "inference_mode" and _plain(ours[key]) != _plain(theirs.get(key))]
    if differ:
        raise LoraError(f"{folder}: adapter_config.json differs in {', '.join(differ)}", exit_code=1)
    expected, written = tensors(model), load_file(folder / WEIGHTS)
    if expected.keys() != written.keys():
        return math.inf
    pairs = [(tensor.cpu(), written[name]) for name, tensor in expected.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return math.inf
    reference = logits(model)
    worst = max(_difference(a, b) for a, b in pairs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(math.nan)
    loaded = PeftModel.from_pretrained(_bare(model), str(folder))
    arrange(loaded)
    return max(worst, _difference(logits(loaded), reference))


def _bare(model: PeftModel) -> Any:
    """The base without the adapter."""
    held.release(model)
    if not model.active_peft_config.is_prompt_learning:
        return model.unload()
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # a task's head, trained whole
            base.set_submodule(name, module.original_module)
    return base


def _plain(value: Any) -> Any:
    """JSON has lists for sets and tuples."""
    return sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value


def _difference(a: Tensor, b: Tensor) -> float:
    # NaN is not less than anything: it has to be asked for by name.
    if a.numel() == 0:
        return 0.0
    return math.inf if (a - b).isnan().any() else float((a - b).abs().max())
