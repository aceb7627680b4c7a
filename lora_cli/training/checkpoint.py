"""Save and load what training needs to go on: adapter, optimizer moments and the number of the last step.

Random numbers and the position in the data are functions of (seed, step), see `training/loop.py`, so that the step
number restores them; the learning rate likewise.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_cli.errors import LoraError
from lora_cli.run import atomic


def save(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, *, step: int, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder`/step-NNNNNNNN atomically, then delete all but the `keep` newest; returns what was written.

    `state` is JSON: what must be the same for a resumed run to be the uninterrupted one (seed, data fingerprint).
    """
    target = folder / f"step-{step:08d}"
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    moments = {
        f"{key}.{name}": value.contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
        for key, value in optimizer.state[p].items()
    }
    with atomic.folder(target, replace=True) as partial:
        save_file(_contiguous(get_peft_model_state_dict(model)), partial / "adapter_model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        text = json.dumps({"step": step, "trained": len(names), **state}, indent=2) + "\n"
        (partial / "state.json").write_text(text, encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, *, state: dict[str, Any]) -> int:
    """Restore the newest checkpoint of `folder` into model and optimizer; returns its step, 0 if there is none.

    Raises:
        LoraError: the checkpoint belongs to other data, another seed or another adapter than `state` says.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    changed = [key for key, value in state.items() if saved.get(key) != value]
    if changed:
        raise LoraError(
            f"{newest}: cannot resume, changed since this checkpoint: {', '.join(changed)}",
            hint="train with the recipe and data of the first start, or start over with --fresh",
        )
    adapter = load_file(newest / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    if adapter.keys() != expected.keys():
        raise LoraError(
            f"{newest}: its adapter has other tensors than this recipe's",
            hint="train with the recipe of the first start, or start over with --fresh",
        )
    set_peft_model_state_dict(model, adapter)
    moments = load_file(newest / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                key: moments[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(saved["step"])


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
