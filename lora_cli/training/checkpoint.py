"""Checkpoints: save, prune and load the adapter, the optimizer state and the step number, so that a run can resume.

Random numbers, the position in the data and the learning rate are functions of (seed, step), see `training/loop.py`:
the step number restores them. Each checkpoint is also a plain PEFT adapter that can be evaluated or merged.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model import save_adapter
from lora_cli.model.adalora import AdaLoraRankAllocator
from lora_cli.run import console
from lora_cli.run.checksums import verified_folder
from lora_cli.run.read_file import read_json_object
from lora_cli.training import checkpoint_folders
from lora_cli.training.best_step import EvaluationHistory
from lora_cli.training.checkpoint_folders import STATE_FILE, checkpoint_folder, list_checkpoints
from lora_cli.training.optimizer import averaged_weights, optimizer_state, restore_optimizer_state

EXTRA_TENSORS = "trained.safetensors"  # trainable parameters that the adapter file lacks, AdaLoRA's scores
OPTIMIZER_STATE = "optimizer.safetensors"
ALLOCATOR_PREFIX = "upkeep|"  # of the keys of AdaLoRA's rank allocator in EXTRA_TENSORS


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
    history: EvaluationHistory | None = None,
    keep_best: bool = False,
    info: Callable[[str], None] = console.info,
) -> Path:
    """Write the checkpoint `folder`/step-NNNNNNNN atomically, prune older ones, and return its path.

    With a schedule-free optimizer, the adapter is the average of the weights, and the training weights are saved with
    the optimizer's state.

    Args:
        folder: of all checkpoints of the run.
        model: the model in training.
        optimizer: over its trainable parameters.
        step: number of optimizer steps done.
        state: values that must not change between the interrupted and the resumed run (seed, data fingerprint), as
            JSON.
        keep: number of checkpoints to keep, this one included.
        write_adapter: writes the adapter into a folder.
        rank_allocator: of AdaLoRA, whose state is saved too.
        history: evaluations so far, which are saved too.
        keep_best: whether the checkpoint of the best step of `history` is kept in addition.
        info: reports damaged checkpoints, which do not count.
    """
    target = checkpoint_folder(folder, step)
    history = history or EvaluationHistory(start_is_candidate=False)
    with (
        averaged_weights(optimizer),
        verified_folder(target, kind=checkpoint_folders.KIND, published=False, replace=True) as partial,
    ):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        moments = {
            f"{key}|{name}": value.contiguous()
            for name, p in trainable.items()
            for key, value in optimizer_state(optimizer, p).items()
        }
        saved_names = save_adapter.saved_names(model)
        extra = {name: trainable[name].detach() for name, saved_name in saved_names.items() if saved_name is None}
        if rank_allocator:
            extra |= {f"{ALLOCATOR_PREFIX}{key}": value for key, value in rank_allocator.state_dict().items()}
        write_adapter(partial)
        save_file(_without_shared_memory(moments), partial / OPTIMIZER_STATE)
        if extra:
            save_file(_without_shared_memory(extra), partial / EXTRA_TENSORS)
        history.save_rows(partial)
        values = {"step": step, "trained": len(trainable), "evaluations": history.to_json(), **state}
        (partial / STATE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    best = history.best.step if keep_best and history.best else None
    checkpoint_folders.prune_checkpoints(folder, keep, info=info, best=best)
    return target


def load_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    state: dict[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    rank_allocator: AdaLoraRankAllocator | None = None,
    history: EvaluationHistory | None = None,
) -> int:
    """Load the newest checkpoint of `folder` into model, optimizer and history.

    Its files are not verified here: see `checkpoint_folders.set_aside_damaged`, which one process of a run calls first.

    Args:
        folder: of all checkpoints of the run.
        model: with the adapter.
        optimizer: over its trainable parameters.
        state: values that must equal those of the checkpoint.
        defaults: of `state`, for values and keys of values that checkpoints of earlier versions lack.
        rank_allocator: of AdaLoRA.
        history: evaluations so far.

    Returns:
        The step number of the checkpoint; 0 if no checkpoint exists.

    Raises:
        LoraError: the checkpoint's state differs from `state` (data, seed, adapter options), or its adapter has other
            tensors than `model`.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    saved_state = read_json_object(newest / STATE_FILE)
    changed = [key for key, value in state.items() if _filled(saved_state.get(key), value, defaults.get(key)) != value]
    if changed:
        raise LoraError(
            f"{newest}: cannot resume, changed since this checkpoint: {', '.join(changed)}",
            hint="use the recipe and data that the run was started with, or start over with --fresh",
        )
    load_weights(newest, model, rank_allocator=rank_allocator)
    moments = load_file(newest / OPTIMIZER_STATE)
    for name, parameter in model.named_parameters():
        own = {key.partition("|")[0]: value for key, value in moments.items() if key.partition("|")[2] == name}
        if own:
            restore_optimizer_state(optimizer, parameter, own)
    if history is not None:
        history.restore(saved_state, newest)
    return int(saved_state["step"])


def _filled(saved: Any, now: Any, default: Any) -> Any:
    """Return the saved value of a setting; the default where it lacks the value, or keys that the value has now."""
    if isinstance(saved, dict) and isinstance(now, dict) and isinstance(default, Mapping):
        return {**{key: default[key] for key in now if key in default}, **saved}
    return default if saved is None else saved


@torch.no_grad()
def load_weights(checkpoint: Path, model: PeftModel, *, rank_allocator: AdaLoraRankAllocator | None = None) -> None:
    """Load the trained parameters of one checkpoint into `model`, without the state of the optimizer.

    Raises:
        LoraError: the checkpoint's adapter has other tensors than `model`.
    """
    adapter = load_file(checkpoint / save_adapter.ADAPTER_WEIGHTS)
    extra = load_file(checkpoint / EXTRA_TENSORS) if (checkpoint / EXTRA_TENSORS).is_file() else {}
    if rank_allocator is not None:
        prefixed = {key: value for key, value in extra.items() if key.startswith(ALLOCATOR_PREFIX)}
        rank_allocator.load_state_dict({key.removeprefix(ALLOCATOR_PREFIX): value for key, value in prefixed.items()})
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor | None] = {
        name: extra.get(name) if saved_name is None else adapter.get(saved_name)
        for name, saved_name in save_adapter.saved_names(model).items()
    }
    shapes_match = all(value is not None and value.shape == parameters[name].shape for name, value in values.items())
    if not shapes_match or adapter.keys() != save_adapter.adapter_tensors(model).keys():
        raise LoraError(
            f"{checkpoint}: its adapter has other tensors than this recipe's",
            hint="use the recipe that the run was started with, or start over with --fresh",
        )
    for name, value in values.items():
        parameters[name].copy_(value)


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with copies of those that share memory with an earlier one: safetensors rejects sharing."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in tensors.items():
        contiguous = tensor.contiguous()
        is_shared = contiguous.data_ptr() in seen and contiguous.numel()
        copies[name] = contiguous.clone() if is_shared else contiguous
        seen.add(contiguous.data_ptr())
    return copies
