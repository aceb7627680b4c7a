"""`lora export`: a model or an adapter in a runtime's form, read back and run before it is put in place."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.commands import merge as merging
from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.data.dataset import IGNORE_INDEX
from lora_cli.errors import LoraError
from lora_cli.export import EXPORTERS, Exporter
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.merging import verify
from lora_cli.model import base_model, prequantized, safetensors_io
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import atomic, console
from lora_cli.setup.inputs import load_inputs
from lora_cli.setup.saved_adapter import CPU, check_same_base, open_saved_adapter, read_config

PROMPTS = 8  # of the run's held-out rows
LONGEST_PROMPT = 512  # tokens
VERDICT = "export.json"
# What a form keeps of a stored weight; other bases are merged in fp32, so that nothing is rounded twice.
KEEPS = {"f16": torch.float16, "bf16": torch.bfloat16}


class ExportRequest(NamedTuple):
    """What the command line says besides target and place."""

    to: str
    quantize: str | None
    over: Path | None
    base: str | None
    verify: str  # auto, file or runtime
    force: bool
    other_base: bool
    trust_remote_code: bool


def export(target: str, *, out: Path, request: ExportRequest) -> None:
    """Write `target` to `out`.

    Raises:
        LoraError: it cannot be written in this form, or what was written is not what it was made of.
    """
    exporter = EXPORTERS[request.to]
    adapter = _adapter_of(Path(target).expanduser())
    _refuse_place(out, Path(target).expanduser(), adapter, exporter, request)
    module = exporter.load()
    if request.verify == "runtime":
        exporter.need_prover()
    atomic.remove_leftovers(out.absolute().parent, out.name)  # what an export that was killed has left
    with ExitStack() as stack:
        if adapter is None:
            if exporter.takes == "adapter":
                raise LoraError(
                    f"--to {request.to} takes an adapter, and {target} is a model", hint="give runs/NAME/adapter"
                )
            subject, over = _whole(target, request), None
        else:
            subject, over = _adapted(adapter, request)
        options = ExportOptions(request.quantize, request.over or over, _runs(exporter, subject, request))
        module.refuse(subject, options)
        if adapter is not None and exporter.takes == "model":
            scratch = stack.enter_context(atomic.temporary_folder(out))
            subject = _merged(adapter, subject, scratch / "model", request)
        with _place(out, exporter, request) as (partial, verdict):
            console.info(f"writing {request.to}" + (f" ({request.quantize})" if request.quantize else ""))
            module.write(subject, partial, options)
            checks = _proven(module, subject, partial, options)
            atomic.write_json(verdict, _verdict(target, subject, partial, checks, request))
        for line in module.usage(subject, out, options):
            console.info(line)
    console.out.print(str(out))


def _adapter_of(target: Path) -> Path | None:
    """The adapter folder that `target` is or has; None for a model."""
    for folder in (target, target / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def _refuse_place(out: Path, target: Path, adapter: Path | None, exporter: Exporter, request: ExportRequest) -> None:
    if request.over is not None and request.to != "gguf-adapter":
        raise LoraError(f"--over is for --to gguf-adapter, not for {request.to}", hint="leave it out")
    if exporter.suffix and out.suffix != exporter.suffix:
        raise LoraError(
            f"--out {out}: {request.to} is one file, whose name ends in {exporter.suffix}",
            hint=f"write --out {out.with_name(out.name + exporter.suffix)}",
        )
    if out.resolve() in {path.resolve() for path in (target, adapter, request.over) if path is not None}:
        raise LoraError(f"--out {out}: that is what is exported", hint="name another place")
    if out.exists() and not request.force:
        raise LoraError(f"--out {out} exists", hint="name another place, or replace it with --force")
    if out.is_dir() == bool(exporter.suffix) and out.exists():
        raise LoraError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}", hint="name another place")
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")


def _whole(target: str, request: ExportRequest) -> ExportSource:
    """A model, as it is."""
    spec = ModelSpec(path=target, gguf="dequantized", trust_remote_code=request.trust_remote_code)
    source = base_model.find_model(spec, dtype=torch.float32, device=CPU, info=console.info)
    config = base_model.load_config(source)
    if (already := prequantized.detect_prequantized(config)) is not None:
        raise LoraError(
            f"{target} is quantised ({already.method}): a form is made of whole weights",
            hint="export the 16-bit model that it was made from",
        )
    known: dict[str, TaskName] = {"ForSequenceClassification": "seq-cls", "ForTokenClassification": "token-cls"}
    named = (config.architectures or [""])[0]
    otherwise: TaskName = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    task = next((task for ending, task in known.items() if named.endswith(ending)), otherwise)
    return ExportSource(
        Path(target).stem if source.file else Path(target).name,
        base_model.local_folder(source, fetch=True),
        config,
        base_model.load_tokenizer(source),
        task,
        _labels(config) if task in ("seq-cls", "token-cls") else None,
        (),
        trust_remote_code=request.trust_remote_code,
    )


def _labels(config: PretrainedConfig) -> ClassLabels:
    """What a classifier's own head tells apart."""
    kinds: tuple[LabelKind, ...] = ("single", "multi", "regression")
    kind: LabelKind = next((kind for kind in kinds if base_model.PROBLEM_TYPES[kind] == config.problem_type), "single")
    return ClassLabels(kind, tuple(config.id2label[number] for number in sorted(config.id2label)))


def _adapted(folder: Path, request: ExportRequest) -> tuple[ExportSource, Path | None]:
    """An adapter on its base, and the base's GGUF file where it is one."""
    config = read_config(folder)
    found = open_saved_adapter(folder, config, base_path=request.base, trust_remote_code=request.trust_remote_code)
    check_same_base(found, allowed=request.other_base)
    subject = ExportSource(
        folder.parent.name if folder.name == "adapter" else folder.name,
        base_model.local_folder(found.source, fetch=True),
        found.skeleton().config,
        found.tokenizer,
        found.task,
        found.labels,
        _held_out(folder),
        adapter=folder,
        trust_remote_code=request.trust_remote_code,
    )
    return subject, found.source.file


def _held_out(adapter: Path) -> tuple[tuple[int, ...], ...]:
    """The questions of rows that the adapter's run held out, up to where an answer begins."""
    file = adapter.parent / "recipe.yaml"
    if not file.is_file():
        return ()
    try:
        recipe = load_recipe(file)
        rows = load_inputs(recipe, info=console.no_output, weights=False).data
    except LoraError as reason:
        console.info(f"the run's held-out rows are not to be had, made-up prompts take their place: {reason.message}")
        return ()
    if recipe.task != "causal-lm":
        return ()
    found = []
    held = rows.eval if rows.eval is not None else rows.train
    for number in range(len(held)):
        row = held[number]
        supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
        if len(supervised) and 0 < supervised[0] <= LONGEST_PROMPT:
            found.append(tuple(row.input_ids[: supervised[0]].tolist()))
        if len(found) == PROMPTS:
            break
    return tuple(found)


def _runs(exporter: Exporter, subject: ExportSource, request: ExportRequest) -> bool:
    """Whether the export is run in its runtime, beside the original in memory; what is left out is said."""
    if request.verify == "file" or not exporter.prover:
        return request.verify != "file"
    if not exporter.can_prove():
        package = next(iter(exporter.prover))
        console.info(
            f"note: read back, but not run: the package {package} is not installed "
            f'(pip install "lora-cli[{exporter.prover_extra}]")'
        )
        return False
    parameters = sum(parameter.numel() for parameter in base_model.skeleton(subject.config).parameters())
    if verify.fits_in_memory(parameters) or request.verify == "runtime":
        return True
    console.info("note: read back, but not run: original and export do not fit in memory together (--verify runtime)")
    return False


def _merged(folder: Path, subject: ExportSource, out: Path, request: ExportRequest) -> ExportSource:
    """The adapter folded into its base, in `out`."""
    stored = {tensor.dtype for tensor in safetensors_io.list_tensors(subject.model).values()}
    keeps = KEEPS.get(request.quantize or ("f16" if request.to in ("gguf", "ollama") else ""))
    as_stored = request.to == "safetensors" and request.quantize in (None, "nf4")
    options = merging.MergeOptions(
        base=request.base,
        dtype="auto" if as_stored or (keeps is not None and stored == {keeps}) else "float32",
        weights="auto",
        verify="auto" if request.verify != "file" else "tensors",
        max_shard_size="2GB",
        force=False,
        unmerge=False,
        other_base=request.other_base,
        trust_remote_code=request.trust_remote_code,
    )
    merging.write(folder, out=out, options=options)
    source = base_model.ModelSource(str(out), {"trust_remote_code": request.trust_remote_code})
    return subject._replace(model=out, config=base_model.load_config(source), adapter=None)


@contextmanager
def _place(out: Path, exporter: Exporter, request: ExportRequest) -> Iterator[tuple[Path, Path]]:
    """Where the export is written before it is at its place, and where the verdict goes."""
    if exporter.suffix:
        with atomic.file(out, replace=request.force) as partial:
            yield partial, out.with_suffix(f".{VERDICT}")
    else:
        with atomic.folder(out, replace=request.force) as partial:
            yield partial, partial / VERDICT


def _proven(module: ModuleType, subject: ExportSource, partial: Path, options: ExportOptions) -> list[Check]:
    checks: list[Check] = []
    for check in module.prove(subject, partial, options):
        kind = "note" if check.name == "note" else f"{check.name}: verified" if check.passed else f"{check.name}: WRONG"
        console.info(f"{kind}: {check.found}")
        checks.append(check)
    if wrong := [check for check in checks if not check.passed]:
        # Over a base on a grid of so few values, that form can round an adapter's whole update away.
        lossy = options.quantize is not None and wrong[0].name == "distribution"
        advice = "so few bits may round the adapter away: try --quantize q8_0" if lossy else "please report the model"
        raise LoraError(
            f"the export is not the model: {wrong[0].name}: {wrong[0].found}",
            hint=f"nothing was put in place; {advice}; --verify file writes it without running it",
            exit_code=1,
        )
    return checks


def _verdict(
    target: str, subject: ExportSource, partial: Path, checks: list[Check], request: ExportRequest
) -> dict[str, Any]:
    files = sorted(partial.rglob("*")) if partial.is_dir() else [partial]
    adapter = _adapter_of(Path(target).expanduser())
    return {
        "source": {
            "target": target,
            "base": request.base or (str(read_config(adapter).base_model_name_or_path) if adapter else target),
            "weights": {str(file.relative_to(subject.model)): _sha256(file) for file in _weights(subject.model)},
            "adapter": _sha256(adapter / "adapter_model.safetensors") if adapter else None,
        },
        "format": request.to,
        "quantize": request.quantize,
        "files": {
            (file.relative_to(partial).as_posix() if partial.is_dir() else "."): {
                "bytes": file.stat().st_size,
                "sha256": _sha256(file),
            }
            for file in files
            if file.is_file()
        },
        "checks": [check._asdict() for check in checks],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _weights(folder: Path) -> list[Path]:
    return sorted({tensor.file for tensor in safetensors_io.list_tensors(folder).values()})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
