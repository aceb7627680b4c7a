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
from lora_cli.model.finite import describe_not_finite
from lora_cli.run import console
from lora_cli.run.checksums import verified_folder
from lora_cli.training import checkpoint_folders
from lora_cli.training.best_step import EvaluationHistory
from lora_cli.training.checkpoint_folders import STATE_FILE, SavedState, checkpoint_folder, list_checkpoints
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

    Raises:
        LoraError: a tensor is not finite; nothing is written then.
    """
    target = checkpoint_folder(folder, step)
    history = history or EvaluationHistory(start_is_candidate=False)
    with averaged_weights(optimizer):
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
        check_finite({**trainable, **extra}, moments, step=step, folder=folder)
        with verified_folder(target, kind=checkpoint_folders.KIND, published=False, replace=True) as partial:
            write_adapter(partial)
            save_file(_without_shared_memory(moments), partial / OPTIMIZER_STATE)
            if extra:
                save_file(_without_shared_memory(extra), partial / EXTRA_TENSORS)
            history.save_rows(partial)
            values = {"step": step, "trained": len(trainable), "evaluations": history.to_json(), **state}
            (partial / STATE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    prune(folder, keep, history, keep_best=keep_best, info=info)
    return target


def prune(folder: Path, keep: int, history: EvaluationHistory, *, keep_best: bool, info: Callable[[str], None]) -> None:
    """Delete the checkpoints in `folder` that `keep` and `keep_best` do not keep, see `save_checkpoint`."""
    best = history.best.step if keep_best and history.best else None
    checkpoint_folders.prune_checkpoints(folder, keep, info=info, best=best)


def check_finite(
    weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] = MappingProxyType({}), *, step: int, folder: Path
) -> None:
    """Check tensors of `step` before they are saved: trained weights by name, moments by `kind|name`.

    Raises:
        LoraError: one has a NaN or an infinity. The hint names the newest checkpoint of `folder`.
    """
    if found := describe_not_finite({**weights, **_readable_names(moments)}):
        hint = "train again with a lower training.learning_rate or a longer training.warmup"
        if checkpoints := list_checkpoints(folder):
            hint = (
                f"{checkpoints[-1]} is from before it: go on with --resume --set training.on_spike=skip, or with a "
                f"lower training.learning_rate, another output and adapter.from: {checkpoints[-1]}"
            )
        raise LoraError(f"step {step} is not saved: {found}", hint=hint, exit_code=1)


def _readable_names(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key.partition('|')[0]} of {key.partition('|')[2]}": value for key, value in moments.items()}


def load_checkpoint(
    saved: SavedState,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    rank_allocator: AdaLoraRankAllocator | None = None,
    history: EvaluationHistory | None = None,
) -> None:
    """Load a checkpoint into model, optimizer and history.

    Args:
        saved: the checkpoint, of a run with the same base, data and recipe.
        model: with the adapter.
        optimizer: over its trainable parameters.
        rank_allocator: of AdaLoRA.
        history: evaluations so far.

    Raises:
        LoraError: its adapter has other tensors than `model`, or a tensor is not finite.
    """
    load_weights(saved.folder, model, rank_allocator=rank_allocator)
    moments = load_file(saved.folder / OPTIMIZER_STATE)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if found := describe_not_finite({**weights, **_readable_names(moments)}):
        raise LoraError(
            f"{saved.folder}: {found}",
            hint="remove this checkpoint: --resume takes the one before it, or starts from the first step",
        )
    for name, parameter in model.named_parameters():
        own = {key.partition("|")[0]: value for key, value in moments.items() if key.partition("|")[2] == name}
        if own:
            restore_optimizer_state(optimizer, parameter, own)
    if history is not None:
        history.restore(saved.values, saved.folder)


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


def load_best(folder: Path, step: int, model: PeftModel, *, rank_allocator: AdaLoraRankAllocator | None = None) -> None:
    """Load the weights of the best step from its checkpoint in `folder`, which is verified.

    Raises:
        LoraError: the checkpoint is missing or damaged.
    """
    checkpoint = checkpoint_folder(folder, step)
    hint = "restore the folder, or start over with --fresh"
    if not checkpoint.is_dir():
        raise LoraError(f"{checkpoint} is missing: it has the adapter of the best step", hint=hint)
    if damage := checkpoint_folders.checkpoint_damage(checkpoint):
        raise LoraError(f"{checkpoint}, which has the adapter of the best step, is damaged: {damage}", hint=hint)
    load_weights(checkpoint, model, rank_allocator=rank_allocator)


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
