"""`lora export`: write a model or adapter in a runtime's format; read it back and run it before it is put in place."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.data.check_template import check_tokenizer_templates
from lora_cli.data.class_labels import ClassLabels, LabelKind
from lora_cli.errors import LoraError
from lora_cli.export import EXPORTERS, Exporter
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import prequantized, safetensors_io
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.base_model import PROBLEM_TYPES, BaseCheckpoint
from lora_cli.model.memory import fits_in_memory
from lora_cli.model.model_source import ModelSource, find_model, load_config, load_tokenizer, local_folder
from lora_cli.model.saved_adapter import CPU, SavedAdapter, check_same_base, find_base
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import atomic, console
from lora_cli.run.checksums import list_files, verified_folder
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.folder import EXPORT_VERDICT
from lora_cli.run.redact import redact_path
from lora_cli.run.workspace import remove_leftovers
from lora_cli.setup.export_paths import find_exported_adapter, verdict_path
from lora_cli.setup.held_out import HeldOutRows
from lora_cli.setup.merged_model import MergeOptions, write_merged_model

# Formats that store 16-bit weights exactly; for others the adapter is merged in fp32, so that rounding happens once.
EXACT_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


class ExportRequest(NamedTuple):
    """Options of the command line."""

    to: str
    quantize: str | None
    over: Path | None
    base: str | None
    verify: str  # auto, file or runtime
    force: bool
    other_base: bool
    trust_remote_code: bool


def export(target: str, *, out: Path, request: ExportRequest) -> dict[str, Any]:
    """Write `target`, a model, a run or an adapter, to `out`; return the content of export.json.

    Raises:
        LoraError: it cannot be written in this format, or the written export differs from the original.
    """
    exporter = EXPORTERS[request.to]
    remove_leftovers(out.absolute().parent, out.name)  # of an export that was killed
    folder = find_exported_adapter(target)
    module = exporter.load()
    if request.verify == "runtime":
        exporter.require_runtime()
    with ExitStack() as stack:
        over, adapter = None, None
        if folder is None:
            if exporter.accepts == "adapter":
                raise LoraError(
                    f"--to {request.to} needs an adapter, but {target} is a model", hint="give runs/NAME/adapter"
                )
            source = _open_model(target, request)
        else:
            held_out = HeldOutRows(folder)
            adapter = _open_adapter(open_adapter(folder), request)
            source, over = _adapter_source(adapter, held_out), adapter.base.source.gguf_file
        check_tokenizer_templates(source.tokenizer, source.name, must_parse=True)
        options = ExportOptions(request.quantize, request.over or over, _runs_in_runtime(exporter, source, request))
        module.check_supported(source, options)
        _check_disk(out, source, module, options, request)
        if adapter is not None and exporter.accepts == "model":
            merged = stack.enter_context(atomic.temporary_folder(out)) / "model"
            write_merged_model(adapter, merged, options=_merge_options(source, request), held_out=held_out)
            source = source.at(merged)
        with _output(out, exporter, request) as (partial, verdict):
            console.info(f"writing {request.to}" + (f" ({request.quantize})" if request.quantize else ""))
            module.write(source, partial, options)
            checks = _run_checks(module, source, partial, options)
            record = _verdict(target, adapter, source, partial, checks, request)
            atomic.write_json_unpublished(verdict, record)
        for line in module.usage(source, out, options):
            console.info(line)
    console.out.print(str(out))
    return record


def _open_model(target: str, request: ExportRequest) -> ExportSource:
    """Open a model; the task follows from its architecture."""
    spec = ModelSpec(path=target, gguf="dequantized", trust_remote_code=request.trust_remote_code)
    source = find_model(spec, dtype=torch.float32, device=CPU, info=console.info)
    config = load_config(source)
    if (quantized := prequantized.detect_prequantized(config)) is not None:
        raise LoraError(
            f"{target} is quantized ({quantized.method}): exports are made from unquantized weights",
            hint="export the 16-bit model that it was made from",
        )
    tasks: dict[str, TaskName] = {"ForSequenceClassification": "seq-cls", "ForTokenClassification": "token-cls"}
    architecture = (config.architectures or [""])[0]
    language_model: TaskName = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    task = next((task for ending, task in tasks.items() if architecture.endswith(ending)), language_model)
    tokenizer = load_tokenizer(source)
    base = BaseCheckpoint(
        name=Path(target).stem if source.gguf_file else Path(target).name,
        source=ModelSource(str(local_folder(source, fetch=True)), source.trust_remote_code),
        config=config,
        tokenizer=tokenizer,
        task=task,
        labels=_head_labels(config) if task in ("seq-cls", "token-cls") else None,
        pad_id=tokenizer.pad_token_id,
    )
    return ExportSource(base.name, base, prompts=())


def _head_labels(config: PretrainedConfig) -> ClassLabels:
    """Return the labels of a classifier's own head."""
    kinds: tuple[LabelKind, ...] = ("single", "multi", "regression")
    kind: LabelKind = next((kind for kind in kinds if PROBLEM_TYPES[kind] == config.problem_type), "single")
    return ClassLabels(kind, tuple(config.id2label[number] for number in sorted(config.id2label)))


def _open_adapter(files: AdapterFiles, request: ExportRequest) -> SavedAdapter:
    adapter = find_base(files, path=request.base, trust_remote_code=request.trust_remote_code)
    check_same_base(files, adapter.base, allowed=request.other_base)
    return adapter


def _adapter_source(adapter: SavedAdapter, held_out: HeldOutRows) -> ExportSource:
    """Return adapter and base as an export source, named after the run."""
    folder, base = adapter.folder, adapter.base
    config = base.skeleton().config  # with the adapter's labels and vocabulary
    if (quantization := getattr(base.config, "quantization_config", None)) is not None:
        config.quantization_config = quantization  # the skeleton's config lacks it
    local = ModelSource(str(local_folder(base.source, fetch=True)), base.source.trust_remote_code)
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return ExportSource(name, base._replace(config=config, source=local), held_out.prompts(), adapter=adapter.files)


def _check_disk(
    out: Path, source: ExportSource, module: ModuleType, options: ExportOptions, request: ExportRequest
) -> None:
    """Check that the export, and the merged model that it is made from, fit on the disk.

    Raises:
        LoraError: they do not.
    """
    needs = [Need(out, module.size(source, options), f"the export ({request.to})")]
    if source.adapter is not None and EXPORTERS[request.to].accepts == "model":
        stored = sum(tensor.size for tensor in safetensors_io.list_tensors(source.folder).values())
        merged = 4 * source.parameters if _merge_options(source, request).dtype == "float32" else stored
        needs.append(Need(out, merged, "the merged model that it is made from"))
    check_free_space(needs)


def _runs_in_runtime(exporter: Exporter, source: ExportSource, request: ExportRequest) -> bool:
    """Return whether to run the export in its runtime, with the original in memory; a message reports if not."""
    if request.verify == "file" or not exporter.runtime_packages:
        return request.verify != "file"
    if not exporter.has_runtime():
        package = next(iter(exporter.runtime_packages))
        console.info(
            f"note: read back, but not run: the package {package} is not installed "
            f'(pip install "lora-cli[{exporter.runtime_extra}]")'
        )
        return False
    if fits_in_memory(source.parameters) or request.verify == "runtime":
        return True
    console.info("note: read back, but not run: original and export do not fit in memory together (--verify runtime)")
    return False


def _merge_options(source: ExportSource, request: ExportRequest) -> MergeOptions:
    """Choose the dtype of the merged model such that weights are rounded only once."""
    stored = {tensor.dtype for tensor in safetensors_io.list_tensors(source.folder).values()}
    exact = EXACT_DTYPES.get(request.quantize or ("f16" if request.to in ("gguf", "ollama") else ""))
    as_stored = request.to == "safetensors" and request.quantize in (None, "nf4")
    return MergeOptions(
        dtype="auto" if as_stored or (exact is not None and stored == {exact}) else "float32",
        verify="tensors" if request.verify == "file" else "logits",
    )


@contextmanager
def _output(out: Path, exporter: Exporter, request: ExportRequest) -> Iterator[tuple[Path, Path]]:
    """Yield the temporary path that the export is written to, and the path of the verdict (export.json)."""
    if exporter.suffix:
        with atomic.files([out, verdict_path(out)], replace=request.force) as (partial, verdict):
            yield partial, verdict
    else:
        with verified_folder(out, kind="export", published=True, replace=request.force) as partial:
            yield partial, partial / EXPORT_VERDICT


def _run_checks(module: ModuleType, source: ExportSource, partial: Path, options: ExportOptions) -> list[Check]:
    """Run the checks of the format, and print the result of each.

    Raises:
        LoraError: a check failed.
    """
    checks: list[Check] = []
    for check in module.verify(source, partial, options):
        status = (
            "note" if check.name == "note" else f"{check.name}: verified" if check.passed else f"{check.name}: WRONG"
        )
        console.info(f"{status}: {check.found}")
        checks.append(check)
    if failed := [check for check in checks if not check.passed]:
        # If the base's weights have few distinct values, such a format can round an adapter's update away.
        lossy = options.quantize is not None and failed[0].name == "distribution"
        advice = "so few bits may round the adapter away: try --quantize q8_0" if lossy else "please report the model"
        raise LoraError(
            f"the export differs from the model: {failed[0].name}: {failed[0].found}",
            hint=f"nothing was written to --out; {advice}; --verify file writes it without running it",
            exit_code=1,
        )
    return checks


def _verdict(
    target: str,
    adapter: SavedAdapter | None,
    source: ExportSource,
    partial: Path,
    checks: list[Check],
    request: ExportRequest,
) -> dict[str, Any]:
    """Return the content of export.json: hashes of inputs and outputs, checks and versions."""
    files = [partial / name for name in list_files(partial)] if partial.is_dir() else [partial]
    return {
        "source": {
            "target": redact_path(target),
            "base": redact_path(adapter.base.name if adapter else target),
            "weights": {str(file.relative_to(source.folder)): _sha256(file) for file in _weights(source.folder)},
            "adapter": _sha256(adapter.folder / "adapter_model.safetensors") if adapter else None,
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
