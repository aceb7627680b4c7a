"""The proof of a merge in memory: the merged model beside base and adapter, weight by weight and by what they say."""

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
from lora_cli.model import base_model, memory
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run import console
from lora_cli.setup.inputs import batch_plan, load_inputs
from lora_cli.setup.saved_adapter import CPU, SavedAdapter, trained_tokens
from lora_cli.setup.training_model import prepare_for_compute

PROBE_ROWS = 8  # held-out rows that are asked
MAX_POSITIONS = 400  # outputs compared at most: logits of a large vocabulary are large
MIN_RETAINED = 0.5  # of the adapter's effect on the logits

Transforms = dict[str, Callable[[Tensor], Tensor]]


class Probes(NamedTuple):
    """What the models are asked."""

    batches: list[Batch]
    described: str


def fits_in_memory(parameters: int) -> bool:
    """Whether two models of so many parameters fit into memory in fp32, with room to compute."""
    return 2 * 4 * parameters * 1.2 + memory.PROCESS_BYTES < memory.available_memory(CPU)


def should_verify(verify: str, parameters: int) -> bool:
    """Whether the proof in memory is to be made; what is left out is said.

    Raises:
        LoraError: it is asked for, and does not fit.
    """
    if verify == "tensors":
        return False
    if fits_in_memory(parameters):
        return True
    need, free = console.format_bytes(8 * parameters), console.format_bytes(memory.available_memory(CPU))
    if verify == "logits":
        raise LoraError(f"--verify logits: two models take {need}, and {free} are free", hint="write --verify tensors")
    console.info(f"verified by tensors alone: two models take {need} in fp32, and {free} are free")
    return False


def choose_probes(subject: SavedAdapter) -> Probes:
    """Rows that the adapter's run held out, else rows of random tokens."""
    recipe_file = subject.folder.parent / "recipe.yaml"
    if recipe_file.is_file():
        try:
            return _held_out_probes(recipe_file)
        except LoraError as reason:
            console.info(f"the run's held-out rows are not to be had, random tokens take their place: {reason.message}")
    tokenizer = subject.tokenizer
    batches = compare_models.random_probes(
        subject.task,
        vocabulary=min(len(tokenizer), max(subject.vocabulary, subject.base_config.get_text_config().vocab_size)),
        pad_id=tokenizer.pad_token_id or 0,
        start_id=getattr(subject.base_config, "decoder_start_token_id", None),
        end_id=tokenizer.eos_token_id if subject.task == "seq-cls" else None,
        include=trained_tokens(subject.config),
    )
    return Probes(batches, f"{len(batches)} rows of random tokens")


def _held_out_probes(recipe_file: Path) -> Probes:
    recipe = load_recipe(recipe_file)
    opening = load_inputs(recipe, info=console.no_output)
    rows = opening.data.eval or opening.data.train
    plan = batch_plan(recipe, opening, rows, batches_per_step=1)
    batches: list[Batch] = []
    for number in range(min(PROBE_ROWS, len(rows))):
        batches.append(plan.make_batch([number]))
        if sum(len(batch.label_positions) for batch in batches) > MAX_POSITIONS:
            break
    outputs = sum(len(batch.label_positions) for batch in batches)
    which = "held-out" if opening.data.eval is not None else "training"
    unit = TASKS[recipe.task].unit
    return Probes(batches, f"{len(batches)} {which} rows ({outputs} {unit}s)")


def choose_base_weights(
    subject: SavedAdapter, probes: Probes, spec: QuantizationSpec, transforms: Transforms, plan: MergePlan
) -> str:
    """Which weights bring the merged model nearer to the one that was trained: original or dequantized ones."""
    trained = _logits(_load(subject, plan, {}, quantization=spec), probes, subject)
    found = {}
    for name, applied in (("original", {}), ("dequantized", transforms)):
        merged = _logits(_load(subject, plan, applied), probes, subject)
        found[name] = compare_models.compare_logits(merged, trained, None)
    tokens = not TASKS[subject.task].classes
    best = min(found, key=lambda name: found[name].kl if tokens else found[name].apart)
    said = [f"{name} " + (f"KL {a.kl:.1e} nats" if tokens else f"{a.apart:.1e}") for name, a in found.items()]
    console.info(
        f"weights: {best}, nearer to the trained {spec.bits}-bit model on {probes.described}: {', '.join(said)}"
    )
    return best


def verify_merge(
    subject: SavedAdapter, probes: Probes, written: Path, plan: MergePlan, transforms: Transforms
) -> Agreement:
    """Load what was written, and hold it against base and adapter.

    Raises:
        LoraError: a weight is not the merged one, or too little of the adapter's effect is left.
    """
    adapted = _load(subject, plan, transforms)
    expected = _logits(adapted, probes, subject)
    bare = None
    if not TASKS[subject.task].classes:  # a classifier's base has no head of its own
        with adapted.disable_adapter():
            bare = _logits(adapted, probes, subject)
    merged = merged_parameters(adapted)
    options = {"trust_remote_code": subject.source.options["trust_remote_code"]}
    again = base_model.load_base(
        base_model.ModelSource(str(written), options),
        dtype=torch.float32,
        device=CPU,
        task=subject.task,
        labels=subject.labels,
    ).model
    for off in compare_models.mismatches(again, merged, plan.dtypes()):
        raise LoraError(
            f"the merged model is another one: {off.name}, read back, is {off.apart:.3g} times further from PEFT's "
            "merge than rounding explains",
            hint="nothing was put in place; use the adapter as it is, and report this",
            exit_code=1,
        )
    found = compare_models.compare_logits(_logits(again, probes, subject), expected, bare)
    if found.retained is not None and not found.retained >= MIN_RETAINED:
        raise LoraError(
            f"of the adapter's effect on the logits {found.retained:.0%} is left after rounding",
            hint="write a finer dtype: --dtype float32, or use the adapter as it is",
            exit_code=1,
        )
    return found


def _load(
    subject: SavedAdapter, plan: MergePlan, transforms: Transforms, *, quantization: QuantizationSpec | None = None
) -> PeftModel:
    """Base and adapter, as PEFT has them: in fp32, or quantised and computed as in training."""
    model = base_model.load_base(
        subject.source,
        dtype=subject.dtype if quantization else torch.float32,
        device=CPU,
        quantization=quantization,
        task=subject.task,
        labels=subject.labels,
        vocabulary=subject.vocabulary,
        pad_id=subject.tokenizer.pad_token_id,
    ).model
    parameters = dict(model.named_parameters())
    for name, transform in transforms.items():
        parameters[name].data = transform(parameters[name].data).float()
    for name in plan.untied:  # PEFT folds into the weight that is there: both ends would have the update
        owner, _, key = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(getattr(module, key).detach().clone(), requires_grad=False))
    adapted = load_adapter(model, subject.folder, base=subject.base)
    if quantization:
        prepare_for_compute(adapted)
    else:
        adapted.float()
    return adapted


def _logits(model: Any, probes: Probes, subject: SavedAdapter) -> Tensor:
    return compare_models.probe_logits(model, probes.batches, subject.task)
