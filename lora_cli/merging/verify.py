"""Verify a merge in memory: compare the merged model with base and adapter, weight by weight and by its logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.merging import compare_models
from lora_cli.merging.compare_models import Agreement
from lora_cli.merging.deltas import merged_parameters
from lora_cli.merging.stream import MergePlan
from lora_cli.model import memory
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.model_source import ModelSource
from lora_cli.model.saved_adapter import CPU, SavedAdapter, trained_tokens
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run import console

MIN_RETAINED = 0.5  # of the adapter's effect on the logits

Transforms = dict[str, Callable[[Tensor], Tensor]]  # by parameter name: applied to the base's weight before merging


class Probes(NamedTuple):
    """Rows that the models are compared on."""

    batches: list[Batch]
    description: str


def fits_in_memory(parameters: int) -> bool:
    """Return whether two models of `parameters` parameters each fit into memory in fp32, with room for computing."""
    return 2 * 4 * parameters * 1.2 + memory.PROCESS_BYTES < memory.available_memory(CPU)


def should_verify(verify: str, parameters: int) -> bool:
    """Return whether to compare the models in memory; print a message if `auto` decides against it.

    Args:
        verify: auto, tensors or logits.
        parameters: of the model.

    Raises:
        LoraError: `logits` is requested, and two models do not fit into memory.
    """
    if verify == "tensors":
        return False
    if fits_in_memory(parameters):
        return True
    need, free = console.format_bytes(8 * parameters), console.format_bytes(memory.available_memory(CPU))
    if verify == "logits":
        raise LoraError(f"--verify logits: two models need {need}, but {free} are free", hint="write --verify tensors")
    console.info(f"verified by tensors alone: two models need {need} in fp32, but {free} are free")
    return False


def random_probes(adapter: SavedAdapter) -> Probes:
    """Return rows of random tokens, among them the tokens that the adapter trained."""
    base = adapter.base
    batches = compare_models.random_probes(
        base.task,
        vocabulary=min(len(base.tokenizer), max(base.vocabulary, base.config.get_text_config().vocab_size)),
        pad_id=base.pad_id or 0,
        start_id=getattr(base.config, "decoder_start_token_id", None),
        end_id=base.tokenizer.eos_token_id if base.task == "seq-cls" else None,
        include=trained_tokens(adapter.config),
    )
    return Probes(batches, f"{len(batches)} rows of random tokens")


def choose_base_weights(
    adapter: SavedAdapter, probes: Probes, spec: QuantizationSpec, transforms: Transforms, plan: MergePlan
) -> str:
    """Return which base weights bring the merged model closer to the trained one: `original` or `dequantized`.

    Args:
        adapter: trained over a quantized base.
        probes: to compare on.
        spec: how the base was quantized.
        transforms: from original to dequantized weights.
        plan: of the merge.
    """
    trained = _logits(_load(adapter, plan, {}, quantization=spec), probes, adapter)
    agreements = {}
    for name, applied in (("original", {}), ("dequantized", transforms)):
        merged = _logits(_load(adapter, plan, applied), probes, adapter)
        agreements[name] = compare_models.compare_logits(merged, trained, None)
    tokens = not TASKS[adapter.base.task].is_classification
    best = min(agreements, key=lambda name: agreements[name].kl if tokens else agreements[name].max_difference)
    measured = [
        f"{name} " + (f"KL {a.kl:.1e} nats" if tokens else f"{a.max_difference:.1e}") for name, a in agreements.items()
    ]
    console.info(
        f"weights: {best}, closer to the trained {spec.bits}-bit model on {probes.description}: {', '.join(measured)}"
    )
    return best


def verify_merge(
    adapter: SavedAdapter, probes: Probes, written: Path, plan: MergePlan, transforms: Transforms
) -> Agreement:
    """Load the merged model from `written`, and compare it with base and adapter.

    Raises:
        LoraError: a weight differs from PEFT's merge, or too little of the adapter's effect is left.
    """
    adapted = _load(adapter, plan, transforms)
    expected = _logits(adapted, probes, adapter)
    base_logits = None
    if not TASKS[adapter.base.task].is_classification:  # a classifier's base has no head of its own
        with adapted.disable_adapter():
            base_logits = _logits(adapted, probes, adapter)
    merged = merged_parameters(adapted)
    source = ModelSource(str(written), adapter.base.source.trust_remote_code)
    reloaded = adapter.base.at(source).load(CPU, dtype=torch.float32).model
    for mismatch in compare_models.mismatches(reloaded, merged, plan.dtypes()):
        raise LoraError(
            f"the merged model is wrong: {mismatch.name}, read back, differs from PEFT's merge by "
            f"{mismatch.error_ratio:.3g} times what rounding explains",
            hint="nothing was written to --out; use the adapter unmerged, and report this",
            exit_code=1,
        )
    agreement = compare_models.compare_logits(_logits(reloaded, probes, adapter), expected, base_logits)
    if agreement.retained is not None and not agreement.retained >= MIN_RETAINED:
        raise LoraError(
            f"after rounding, {agreement.retained:.0%} of the adapter's effect on the logits is left",
            hint="write a finer dtype: --dtype float32, or use the adapter unmerged",
            exit_code=1,
        )
    return agreement


def _load(
    adapter: SavedAdapter, plan: MergePlan, transforms: Transforms, *, quantization: QuantizationSpec | None = None
) -> PeftModel:
    """Load base and adapter by PEFT: in fp32, or with `quantization`, quantized and computed as in training."""
    dtype = None if quantization else torch.float32
    model = adapter.base.load(CPU, dtype=dtype, quantization=quantization).model
    parameters = dict(model.named_parameters())
    for name, transform in transforms.items():
        parameters[name].data = transform(parameters[name].data).float()
    for name in plan.untied:  # PEFT merges in place: both tied parameters would get the update
        owner, _, key = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(getattr(module, key).detach().clone(), requires_grad=False))
    adapted = load_adapter(model, adapter.folder, base=adapter.base.name)
    if quantization:
        upcast_trainable_params(adapted)
    else:
        adapted.float()
    return adapted


def _logits(model: Any, probes: Probes, adapter: SavedAdapter) -> Tensor:
    return compare_models.probe_logits(model, probes.batches, adapter.base.task)
