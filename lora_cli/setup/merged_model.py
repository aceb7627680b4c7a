"""Write a saved adapter merged into its base, tensor by tensor, and verify the result: for `lora merge` and export."""

import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.errors import LoraError
from lora_cli.merging import stream, verify
from lora_cli.merging.compare_models import Agreement
from lora_cli.merging.merge_tensors import MergedTensor
from lora_cli.merging.stream import MergePlan
from lora_cli.merging.streamed_models import Streams
from lora_cli.merging.verify import BaseWeights, Probes
from lora_cli.model import empty_base, fake_quantize, multimodal, prequantized, safetensors_io
from lora_cli.model.adapter_files import AdapterFiles
from lora_cli.model.checkpoint_reader import Transforms
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.model_source import local_folder
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS
from lora_cli.model.saved_adapter import SavedAdapter
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run import atomic, console
from lora_cli.run.checksums import checksum, verified_folder
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.folder import MERGE_VERDICT
from lora_cli.run.redact import redact_path
from lora_cli.setup.held_out import HeldOutRows

MIN_RETAINED = 0.5  # of each update, after rounding: below, more of it is lost than kept
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class MergeOptions(NamedTuple):
    """How a merged model is written and verified."""

    dtype: str = "auto"  # auto (of each tensor of the base), bfloat16, float16 or float32
    weights: str = "auto"  # of a base that was quantized in training: auto (measured), original or dequantized
    verify: str = "logits"  # of each tensor and of the logits; or tensors alone
    max_shard_bytes: int = 2 * 10**9
    replace: bool = False  # the folder, if it exists


def check_method_merges(adapter: AdapterFiles) -> None:
    """Raise if the adapter's method cannot be merged.

    Raises:
        LoraError: it adds virtual tokens.
    """
    if adapter.config.is_prompt_learning:
        raise LoraError(
            f"{adapter.folder}: {adapter.method} adds virtual tokens before the prompt: it cannot be merged into "
            "weights",
            hint="use it with its base in PEFT, or train another adapter.method",
        )


def check_base_merges(adapter: SavedAdapter) -> None:
    """Raise if an adapter cannot be merged into the base.

    Raises:
        LoraError: the base is quantized.
    """
    if (quantized := prequantized.detect_prequantized(adapter.base.config)) is not None:
        raise LoraError(
            f"{adapter.base.name} is quantized ({quantized.method}): an adapter is merged into unquantized weights",
            hint="name the 16-bit model that it was made from: --base PATH --other-base",
        )


def plan_merge(adapter: SavedAdapter, dtype: torch.dtype | None) -> MergePlan:
    """Plan the tensors of the merged model; `dtype` None keeps the dtype of each tensor.

    Raises:
        LoraError: adapter and base do not fit, or the base's files are incomplete.
    """
    tensors = safetensors_io.list_tensors(local_folder(adapter.base.source, fetch=True))
    model = empty_base.init_empty_weights(adapter.base.skeleton())
    mapping = CheckpointMapping(model, tensors)
    adapted = empty_base.attach_saved_adapter(model, adapter.files, base=adapter.base.name)
    keep_unknown = not TASKS[adapter.base.task].is_classification
    return stream.plan_merge(adapted, mapping, tensors, dtype=dtype, keep_unknown=keep_unknown)


def write_merged_model(
    adapter: SavedAdapter, out: Path, *, options: MergeOptions, held_out: HeldOutRows
) -> dict[str, Any]:
    """Write the merged model to the folder `out`, verify it, then move it to its place; return figures for JSON.

    Args:
        adapter: opened with its base.
        out: folder of the merged model.
        options: of the merge.
        held_out: rows of the adapter's run, to compare the models on.

    Raises:
        LoraError: the adapter cannot be merged, the disk has too little space, rounding removes its update, or the
            merged model is wrong.
    """
    check_method_merges(adapter.files)
    check_base_merges(adapter)
    plan = plan_merge(adapter, DTYPES.get(options.dtype))
    spec = _quantization(adapter, options.weights)
    probes = None
    if options.verify == "logits":
        parameters = sum(math.prod(shape) for _, shape in plan.tensors.values())
        tokens = verify.probe_tokens(parameters, adapter.base.config.get_text_config().vocab_size)
        probes = held_out.probes(tokens) or verify.random_probes(adapter, tokens)
    check_free_space([Need(out, plan.size, "the merged model")])
    with verify.open_streams() as streams:
        weights = _base_weights(adapter, spec, probes, options.weights, streams)
        with (
            verified_folder(out, kind="merged model", published=False, replace=options.replace) as partial,
            verify.verification(adapter, probes, weights, streams) as verify_merge,
        ):
            console.info(f"merging {adapter.files.method} into {adapter.base.name}: {describe_size(plan)}")
            start = time.perf_counter()
            transforms = weights.transforms
            merged = write_tensors(plan, partial, max_shard_bytes=options.max_shard_bytes, transforms=transforms)
            seconds = time.perf_counter() - start
            _check_retained(merged, plan)
            write_other_files(adapter, plan, partial, dtype=options.dtype, what="merged")
            agreement = verify_merge(partial)
            verdict = _verdict(adapter, plan, merged, agreement, probes, dequantized=bool(transforms))
            atomic.write_json_unpublished(partial / MERGE_VERDICT, verdict)
            lines = [*_report(merged, plan, seconds), *_describe_agreement(agreement, probes, adapter)]
    for line in lines:
        console.info(line)
    return {
        **size_record(plan),
        "changed_parameters": verdict["changed"],
        "least_update_kept": verdict["smallest_retained"]["share"],
        "seconds": seconds,
        "verified": {"weights_equal": True, "probes": None, **(verdict["logits"] or {})},  # unequal ones are an error
    }


def size_record(plan: MergePlan) -> dict[str, Any]:
    """Return tensors, bytes and dtypes of the model to write, for JSON."""
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in plan.tensors.values()})
    return {"tensors": len(plan.tensors), "bytes": plan.size, "dtypes": dtypes}


def describe_size(plan: MergePlan) -> str:
    """Return the number of tensors, their bytes and dtypes, for the user."""
    size = size_record(plan)
    return f"{size['tensors']:,} tensors, {console.format_bytes(plan.size)} of {' and '.join(size['dtypes'])}"


def _quantization(adapter: SavedAdapter, weights: str) -> QuantizationSpec | None:
    """Return how the base was quantized when the adapter was trained over it."""
    trained_on = adapter.files.trained_on
    section = trained_on.quantization if trained_on else None
    if section is None and weights == "dequantized":
        raise LoraError(
            f"--weights dequantized: {adapter.folder} has no record that its base was quantized in training",
            hint="leave --weights out: the adapter was trained on the base's weights",
        )
    return None if section is None else QuantizationSpec.model_validate(section)


def _base_weights(
    adapter: SavedAdapter, spec: QuantizationSpec | None, probes: Probes | None, weights: str, streams: Streams
) -> BaseWeights:
    """Return the base's weights that the update is added to: as stored, or quantized and dequantized."""
    if spec is None or weights == "original":
        return BaseWeights({})
    names = fake_quantize.quantized_weights(adapter.base.skeleton(), spec)
    dequantized = {
        name: fake_quantize.quantize_dequantize(spec, adapter.base.dtype, transposed=transposed)
        for name, transposed in names.items()
    }
    if weights == "dequantized":
        return BaseWeights(dequantized)
    if probes is None:
        console.info("weights: dequantized, as in training; original weights were not measured")
        return BaseWeights(dequantized)
    return verify.choose_base_weights(adapter, probes, spec, dequantized, streams)


def write_tensors(
    plan: MergePlan, folder: Path, *, max_shard_bytes: int, transforms: Transforms, sign: int = 1
) -> list[MergedTensor]:
    """Write the merged tensors into `folder`, and return the parameters that changed; `sign` -1 unmerges.

    Raises:
        LoraError: a merged weight is not finite, or the adapter changes no weight.
    """
    try:
        merged = stream.write_merged(plan, folder, max_shard_size=max_shard_bytes, transforms=transforms, sign=sign)
    except ValueError as reason:
        raise LoraError(
            f"the merged weights are not finite: {str(reason).splitlines()[0]}",
            hint="the adapter is broken, or the range of --dtype too small; nothing was written",
            exit_code=1,
        ) from reason
    if not merged:
        raise LoraError("the adapter changes no weight: it was never trained", hint="train it first")
    return merged


def write_other_files(adapter: SavedAdapter, plan: MergePlan, folder: Path, *, dtype: str, what: str) -> None:
    """Write config, generation config, Python code, processors, tokenizer and model card of the merged model.

    Args:
        adapter: the adapter that was merged or unmerged.
        plan: of the merge.
        folder: of the merged model.
        dtype: auto, bfloat16, float16 or float32.
        what: merged or unmerged, for the model card.
    """
    base = adapter.base
    model, is_classifier = base.skeleton(), TASKS[base.task].is_classification
    config = model.config
    if dtype != "auto":
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.dtype = DTYPES[dtype]
    if is_classifier or not config.architectures:
        config.architectures = [type(model).__name__]
    if plan.untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.save_pretrained(str(folder))
    files = local_folder(base.source, fetch=False)
    copied = [] if is_classifier else [files / "generation_config.json"]
    copied += files.glob("*.py") if hasattr(config, "auto_map") else []
    for file in copied:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    multimodal.copy_processor_files(files, folder)
    base.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(_model_card(adapter, what), encoding="utf-8")


def _model_card(adapter: SavedAdapter, what: str) -> str:
    name = Path(adapter.base.name).name
    lines = ["---", f"base_model: {name}", "---", f"# {name} with an adapter {what}", ""]
    return "\n".join(
        [*lines, f"A {adapter.files.config.peft_type.value} adapter {what}, task {adapter.base.task}.", ""]
    )


def _check_retained(merged: list[MergedTensor], plan: MergePlan) -> None:
    worst = min(merged, key=lambda tensor: tensor.retained)
    if not worst.retained >= MIN_RETAINED:
        raise LoraError(
            f"{worst.name}: rounding to {plan.dtype_name(worst.name)} keeps {worst.retained:.0%} of its update",
            hint="write a finer dtype: --dtype float32, or use the adapter unmerged",
            exit_code=1,
        )


def _report(merged: list[MergedTensor], plan: MergePlan, seconds: float) -> list[str]:
    worst = min(merged, key=lambda tensor: tensor.retained)
    changed = sum(len(plan.mapping.parts[t.name]) if plan.mapping.is_joined(t.name) else 1 for t in merged)
    lines = [
        f"{changed:,} of {len(plan.tensors):,} tensors changed, in {seconds:.2f} s; rounding to "
        f"{plan.dtype_name(worst.name)} keeps at least {worst.retained:.1%} of each update ({worst.name})"
    ]
    if plan.untied:
        lines.append(f"no longer tied, because the adapter changed one of them: {', '.join(sorted(plan.untied))}")
    if plan.dropped:
        lines.append(
            f"left out, because the task does not use them: {len(plan.dropped)} tensors ({plan.dropped[0]}, ...)"
        )
    return lines


def _verdict(
    adapter: SavedAdapter,
    plan: MergePlan,
    merged: list[MergedTensor],
    agreement: Agreement | None,
    probes: Probes | None,
    *,
    dequantized: bool,
) -> dict[str, Any]:
    """Return the content of merge.json: which adapter was merged into which base, and what the verification found."""
    worst = min(merged, key=lambda tensor: tensor.retained)
    compared = None
    if agreement and probes:
        finite = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in agreement._asdict().items()
        }
        compared = {**finite, "probes": probes.description}
    return {
        "adapter": checksum(adapter.folder / ADAPTER_WEIGHTS, sha256=True).sha256,
        "base": redact_path(adapter.base.name),
        "weights": "dequantized" if dequantized else "as stored",
        **size_record(plan),
        "changed": len(merged),
        "smallest_retained": {"tensor": worst.name, "share": worst.retained},
        "logits": compared,  # null: the weights alone were verified
    }


def _describe_agreement(agreement: Agreement | None, probes: Probes | None, adapter: SavedAdapter) -> list[str]:
    lines = ["verified: every weight, read back, equals PEFT's merge, rounded once"]
    if agreement is not None and probes is not None:
        figures = [f"logits within {agreement.max_difference:.0e}"]
        if not TASKS[adapter.base.task].is_classification:
            figures += [f"KL {agreement.kl:.1e} nats", f"most likely token equal {agreement.top1:.1%}"]
        if agreement.retained is not None:
            figures.append(f"effect retained {agreement.retained:.1%}")
        lines.append(f"verified: compared with base and adapter on {probes.description}: {', '.join(figures)}")
    return lines
