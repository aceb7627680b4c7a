"""`lora merge`: an adapter folded into its base, streamed tensor by tensor, and proven to be both."""

import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig

from lora_cli.errors import LoraError
from lora_cli.merging import stream, verify
from lora_cli.merging.compare_models import Agreement
from lora_cli.merging.merge_tensors import MergedTensor
from lora_cli.merging.verify import Probes, Transforms
from lora_cli.model import base_model, empty_base, fake_quantize, prequantized, safetensors_io
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec
from lora_cli.run import atomic, console
from lora_cli.setup.saved_adapter import CPU, SavedAdapter, check_same_base, open_saved_adapter, read_config

MIN_RETAINED = 0.5  # of an update; below it the model that is written has lost more of it than it kept
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class MergeOptions(NamedTuple):
    """What the command line says besides adapter and place."""

    base: str | None
    dtype: str
    weights: str  # auto, original or dequantized
    verify: str  # auto, tensors or logits
    max_shard_size: str
    force: bool
    unmerge: bool
    other_base: bool
    trust_remote_code: bool


def merge(folder: Path, *, out: Path, options: MergeOptions) -> None:
    """Write `folder`'s adapter, folded into its base, to `out`, and say where that is.

    Raises:
        LoraError: what is given does not fit together, the method cannot be merged, or the merged model is another one.
    """
    write(folder, out=out, options=options)
    console.out.print(str(out))


def write(folder: Path, *, out: Path, options: MergeOptions) -> None:
    """What `merge` does, without a result on stdout.

    Raises:
        LoraError: as `merge`.
    """
    largest = safetensors_io.parse_size(options.max_shard_size)
    subject = _open(folder, out, options)
    atomic.remove_leftovers(out.absolute().parent, out.name)  # what a merge that was killed has left
    plan = _plan(subject, DTYPES.get(options.dtype))
    if options.unmerge:
        _unmerge(subject, plan, out, largest, options)
        return
    spec = _quantization(subject, options)
    parameters = sum(math.prod(shape) for _, shape in plan.tensors.values())
    probes = verify.choose_probes(subject) if verify.should_verify(options.verify, parameters) else None
    transforms = _transforms(subject, plan, spec, probes, options)
    with atomic.folder(out, replace=options.force) as partial:
        console.info(f"folding {subject.method} into {subject.base}: {_amount(plan)}")
        began = time.perf_counter()
        folded = _stream(plan, partial, largest, transforms)
        taken = time.perf_counter() - began
        _refuse_rounded_away(folded, plan)
        _write_rest(subject, plan, partial, options)
        lines = _report(folded, plan, taken)
        if probes is not None:
            lines += _verified(verify.verify_merge(subject, probes, partial, plan, transforms), probes, subject)
    for line in lines:
        console.info(line)


def _open(folder: Path, out: Path, options: MergeOptions) -> SavedAdapter:
    """Adapter and base; what cannot be merged is refused before any weight is read."""
    config = read_config(folder)
    if config.is_prompt_learning:
        raise LoraError(
            f"{folder}: {str(config.peft_type.value).lower().replace('_', ' ')} puts virtual tokens before the prompt: "
            "there is nothing to fold into weights",
            hint="load it beside its base, with PEFT, or train another adapter.method",
        )
    if options.unmerge and options.base is None:
        raise LoraError("--unmerge: from which merged model?", hint="name its folder: --base MERGED")
    _refuse_place(folder, out, config, options)
    subject = open_saved_adapter(folder, config, base_path=options.base, trust_remote_code=options.trust_remote_code)
    if (already := prequantized.detect_prequantized(subject.base_config)) is not None:
        raise LoraError(
            f"{subject.base} is quantised ({already.method}): an update is folded into whole weights",
            hint="name the 16-bit model that it was made from: --base PATH --other-base",
        )
    if not options.unmerge:
        check_same_base(subject, allowed=options.other_base)
    return subject


def _refuse_place(folder: Path, out: Path, config: PeftConfig, options: MergeOptions) -> None:
    given = Path(options.base or str(config.base_model_name_or_path))
    if out.resolve() in (given.resolve(), folder.resolve()):
        raise LoraError(f"--out {out}: that is what is merged", hint="name another folder")
    if out.exists() and not options.force:
        raise LoraError(f"--out {out} exists", hint="name another folder, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")


def _plan(subject: SavedAdapter, dtype: torch.dtype | None) -> stream.MergePlan:
    tensors = safetensors_io.list_tensors(base_model.local_folder(subject.source, fetch=True))
    model = empty_base.init_empty_weights(subject.skeleton())
    mapping = CheckpointMapping(model, tensors)
    adapted = empty_base.attach_saved_adapter(model, subject.folder, subject.config, base=subject.base)
    return stream.plan_merge(adapted, mapping, tensors, dtype=dtype, keep_unknown=not TASKS[subject.task].classes)


def _quantization(subject: SavedAdapter, options: MergeOptions) -> QuantizationSpec | None:
    """How the base was quantised when the adapter was trained over it."""
    section = subject.trained_on.quantization if subject.trained_on else None
    if section is None and options.weights == "dequantized":
        raise LoraError(
            f"--weights dequantized: {subject.folder} does not say that its base was quantised",
            hint="leave --weights out: the base's weights are what it was trained over",
        )
    return None if section is None else QuantizationSpec.model_validate(section)


def _transforms(
    subject: SavedAdapter,
    plan: stream.MergePlan,
    spec: QuantizationSpec | None,
    probes: Probes | None,
    options: MergeOptions,
) -> Transforms:
    """What is done to the base's weights before the update is added: nothing, or a round trip to 4 or 8 bits."""
    if spec is None or options.weights == "original":
        return {}
    names = fake_quantize.quantized_weights(subject.skeleton(), spec)
    found = {
        name: fake_quantize.quantize_dequantize(spec, subject.dtype, turned=turned) for name, turned in names.items()
    }
    if options.weights == "dequantized":
        return found
    if probes is None:
        console.info("weights: dequantized, which the adapter was trained over; original ones were not measured")
        return found
    return found if verify.choose_base_weights(subject, probes, spec, found, plan) == "dequantized" else {}


def _stream(
    plan: stream.MergePlan, folder: Path, largest: int, transforms: Transforms, *, sign: int = 1
) -> list[MergedTensor]:
    try:
        folded = stream.write_merged(plan, folder, largest=largest, transform=transforms, sign=sign)
    except ValueError as reason:
        raise LoraError(
            f"the merged weights are not finite: {str(reason).splitlines()[0]}",
            hint="the adapter is broken, or --dtype too narrow; nothing was written",
            exit_code=1,
        ) from reason
    if not folded:
        raise LoraError("the adapter changes no weight: it was never trained", hint="train it first")
    return folded


def _write_rest(subject: SavedAdapter, plan: stream.MergePlan, folder: Path, options: MergeOptions) -> None:
    """Config, generation config, code, tokenizer and card."""
    model, classes = subject.skeleton(), TASKS[subject.task].classes
    config = model.config
    if options.dtype != "auto":
        config.dtype = DTYPES[options.dtype]
    if classes or not config.architectures:
        config.architectures = [type(model).__name__]
    if plan.untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.save_pretrained(str(folder))
    files = base_model.local_folder(subject.source, fetch=False)
    copied = [] if classes else [files / "generation_config.json"]
    copied += files.glob("*.py") if hasattr(config, "auto_map") else []
    for file in copied:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    subject.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(_card(subject, options), encoding="utf-8")


def _refuse_rounded_away(folded: list[MergedTensor], plan: stream.MergePlan) -> None:
    worst = min(folded, key=lambda each: each.survived)
    if not worst.survived >= MIN_RETAINED:
        raise LoraError(
            f"{worst.name}: of its update {worst.survived:.0%} survives the rounding to {plan.dtype_of(worst.name)}",
            hint="write a finer dtype: --dtype float32, or use the adapter as it is",
            exit_code=1,
        )


def _unmerge(subject: SavedAdapter, plan: stream.MergePlan, out: Path, largest: int, options: MergeOptions) -> None:
    """Take the update away from a merged model again; only what was added can be."""
    if left := plan.not_added():
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise LoraError(
            f"--unmerge: {subject.method} did more than add to {left[0]}{more}, and what was there is gone",
            hint="take the original base",
        )
    with atomic.folder(out, replace=options.force) as partial:
        console.info(f"taking {subject.method} out of {subject.base}: {_amount(plan)}")
        _stream(plan, partial, largest, {}, sign=-1)
        _write_rest(subject, plan, partial, options)
        line = _landing(subject, partial)
    console.info(line)


def _landing(subject: SavedAdapter, folder: Path) -> str:
    """How far the weights are from those of the base that the adapter names, where that is at hand."""
    path = str(subject.config.base_model_name_or_path)
    try:
        spec = ModelSpec(path=path, revision=subject.config.revision, gguf="dequantized")
        source = base_model.find_model(spec, dtype=subject.dtype, device=CPU, info=console.no_output)
        original = safetensors_io.list_tensors(base_model.local_folder(source, fetch=False))
    except LoraError as reason:
        return f"not compared with the original: {reason.message}"
    merged = safetensors_io.list_tensors(base_model.local_folder(subject.source, fetch=False))
    apart = stream.compare_files(safetensors_io.list_tensors(folder), original, between=merged)
    return (
        f"against {path}: {apart.equal:.1%} of the weights are equal, the others within "
        f"{apart.roundings:.2f} units in the last place ({apart.worst})"
    )


def _amount(plan: stream.MergePlan) -> str:
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in plan.tensors.values()})
    return f"{len(plan.tensors):,} tensors, {console.format_bytes(plan.size)} of {' and '.join(dtypes)}"


def _report(folded: list[MergedTensor], plan: stream.MergePlan, seconds: float) -> list[str]:
    worst = min(folded, key=lambda each: each.survived)
    lines = [
        f"{len(folded):,} of {len(plan.tensors):,} tensors changed, in {seconds:.2f} s; of each update at least "
        f"{worst.survived:.1%} survives the rounding to {plan.dtype_of(worst.name)} ({worst.name})"
    ]
    if plan.untied:
        lines.append(f"not tied any more, as the adapter changed one of them: {', '.join(sorted(plan.untied))}")
    if plan.dropped:
        lines.append(f"left out, as the task has no use for them: {len(plan.dropped)} tensors ({plan.dropped[0]}, ...)")
    return lines


def _verified(found: Agreement, probes: Probes, subject: SavedAdapter) -> list[str]:
    said = [f"logits within {found.apart:.0e}"]
    if not TASKS[subject.task].classes:
        said += [f"KL {found.kl:.1e} nats", f"most likely token equal {found.top1:.1%}"]
    if found.retained is not None:
        said.append(f"effect retained {found.retained:.1%}")
    return [
        "verified: read back, every weight is PEFT's merge, rounded once",
        f"verified: against base and adapter, on {probes.described}: {', '.join(said)}",
    ]


def _card(subject: SavedAdapter, options: MergeOptions) -> str:
    name, what = Path(subject.base).name, "taken out again" if options.unmerge else "folded in"
    lines = ["---", f"base_model: {name}", "---", f"# {name} with an adapter {what}", ""]
    return "\n".join([*lines, f"A {subject.config.peft_type.value} adapter {what}, task {subject.task}.", ""])
