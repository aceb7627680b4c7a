"""Save and load what training needs to go on: adapter, optimizer moments and the number of the last step.

Random numbers and the position in the data are functions of (seed, step), see `training/loop.py`, so that the step
number restores them; the learning rate likewise. Each checkpoint is a plain PEFT adapter too, to evaluate or merge.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model import save_adapter
from lora_cli.model.adalora import AdaLoraRankAllocator
from lora_cli.run import atomic
from lora_cli.training.optimizer import optimizer_state, restore_state

EXTRA_TENSORS = "trained.safetensors"  # trained tensors that the adapter's file does not hold as they are
OPTIMIZER_STATE = "optimizer.safetensors"


def save_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    state: dict[str, Any],
    keep: int,
    write_adapter: Callable[[Path], None],
    rank_allocator: AdaLoraRankAllocator | None = None,
) -> Path:
    """Write `folder`/step-NNNNNNNN atomically, then delete all but the `keep` newest; returns what was written.

    Args:
        folder: of the checkpoints.
        model: what is trained.
        optimizer: over its trained parameters.
        step: the number of optimizer steps done.
        state: JSON: what must be the same for a resumed run to be the uninterrupted one (seed, data fingerprint).
        keep: how many checkpoints stay.
        write_adapter: writes the adapter into a folder.
        upkeep: the adapter method's own state, if it has any.
    """
    target = folder / f"step-{step:08d}"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{key}|{name}": value.contiguous()
        for name, p in trained.items()
        for key, value in optimizer_state(optimizer, p).items()
    }
    extra = {name: trained[name].detach() for name, kept in save_adapter.saved_names(model).items() if kept is None}
    extra |= {f"upkeep|{key}": value for key, value in (rank_allocator.state_dict() if rank_allocator else {}).items()}
    with atomic.folder(target, replace=True) as partial:
        write_adapter(partial)
        save_file(_without_shared_memory(moments), partial / OPTIMIZER_STATE)
        if extra:
            save_file(_without_shared_memory(extra), partial / EXTRA_TENSORS)
        text = json.dumps({"step": step, "trained": len(trained), **state}, indent=2) + "\n"
        (partial / "state.json").write_text(text, encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    state: dict[str, Any],
    rank_allocator: AdaLoraRankAllocator | None = None,
) -> int:
    """Restore the newest checkpoint of `folder` into model and optimizer; returns its step, 0 if there is none.

    Raises:
        LoraError: the checkpoint belongs to other data, another seed or another adapter than `state` says.
    """
    found = list_checkpoints(folder)
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
    adapter = load_file(newest / save_adapter.ADAPTER_WEIGHTS)
    extra = load_file(newest / EXTRA_TENSORS) if (newest / EXTRA_TENSORS).is_file() else {}
    if rank_allocator is not None:
        kept = {key.removeprefix("upkeep|"): value for key, value in extra.items() if key.startswith("upkeep|")}
        rank_allocator.load_state_dict(kept)
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor | None] = {
        name: extra.get(name) if kept is None else adapter.get(kept)
        for name, kept in save_adapter.saved_names(model).items()
    }
    fits = all(value is not None and value.shape == parameters[name].shape for name, value in values.items())
    if not fits or adapter.keys() != save_adapter.adapter_tensors(model).keys():
        raise LoraError(
            f"{newest}: its adapter has other tensors than this recipe's",
            hint="train with the recipe of the first start, or start over with --fresh",
        )
    moments = load_file(newest / OPTIMIZER_STATE)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
            mine = {key.partition("|")[0]: value for key, value in moments.items() if key.partition("|")[2] == name}
            if mine:
                restore_state(optimizer, parameters[name], mine)
    return int(saved["step"])


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own memory, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        found[name] = whole.clone() if whole.data_ptr() in seen and whole.numel() else whole
        seen.add(whole.data_ptr())
    return found
