"""Export format `--to gguf`: the full model as one GGUF file, for llama.cpp and programs built on it."""

from collections.abc import Iterator
from pathlib import Path

import gguf

from lora_cli.errors import LoraError
from lora_cli.export import reference
from lora_cli.export.gguf import architectures, llama_cpp_server, tokenizer
from lora_cli.export.gguf.tensors import (
    GGUF_QUANTIZATIONS,
    GGUFQuantization,
    mismatched_tensors,
    plan_tensors,
    write_gguf,
)
from lora_cli.export.gguf.tokenizer import GGUFVocabulary
from lora_cli.export.gguf.verify import check_outputs, check_tokens, context_length, template_options
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import multimodal
from lora_cli.run.shell import shell_path

DEFAULT_QUANTIZATION = "f16"


def quantization_of(options: ExportOptions) -> GGUFQuantization:
    """Return the quantization that `--quantize` names.

    Raises:
        LoraError: this format does not support it.
    """
    name = options.quantize or DEFAULT_QUANTIZATION
    if name not in GGUF_QUANTIZATIONS:
        raise LoraError(
            f"--quantize {name} is not supported; use one of {', '.join(GGUF_QUANTIZATIONS)}",
            hint="for K-quants export f16, then use llama.cpp's tool: llama-quantize IN.gguf OUT.gguf Q4_K_M",
        )
    return GGUF_QUANTIZATIONS[name]


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check quantization, task, architecture, config and tokenizer before any weight is read.

    Raises:
        LoraError: one of them is not supported.
    """
    quantization_of(options)
    if source.task != "causal-lm":
        raise LoraError(
            f"--to gguf: {source.task} models are not supported, only causal language models",
            hint="use --to onnx or --to safetensors",
        )
    architectures.find_architecture(source.config)
    template_options(source)  # raises for a template that cannot be parsed
    _convert_tokenizer(source)


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the weights, if all have the requested type."""
    return source.parameters * quantization_of(options).bits // 8


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the GGUF file `out`.

    Raises:
        LoraError: the model, its tokenizer or a value of its weights cannot be written.
    """
    quantization = quantization_of(options)
    tensors = plan_tensors(source.base, quantization)
    vocabulary = _convert_tokenizer(source)
    architecture = architectures.find_architecture(source.config)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(source.name).name)
        writer.add_file_type(quantization.file_type)
        if quantization.bits < 16:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in architectures.hyperparameters(source.config, architecture):
            getattr(writer, f"add_{name}")(value)
        tokenizer.add_to_writer(vocabulary, writer)

    write_gguf(out, tensors, arch=gguf.MODEL_ARCH_NAMES[architecture.arch], describe=describe)


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: tensors read back by the `gguf` package, and outputs of llama.cpp.

    Raises:
        LoraError: llama.cpp cannot load the file.
    """
    quantization = quantization_of(options)
    yield check_tensors(source, out, quantization)
    vocabulary = _convert_tokenizer(source)
    architecture = architectures.find_architecture(source.config)
    for note in (*_left_out(source), *architectures.notes(source.config, architecture), *vocabulary.notes):
        yield Check("note", True, note)
    if options.runtime:
        vocab_size = source.config.get_text_config().vocab_size
        with llama_cpp_server.run_llama_cpp(
            out, vocab_size=vocab_size, context_length=context_length(source)
        ) as runtime:
            yield from check_tokens(source, runtime, vocabulary.eos_ids)
            yield from check_outputs(source, reference.ReferenceModel(source), runtime, quantization)


def _left_out(source: ExportSource) -> Iterator[str]:
    """Yield a note on the parts of a multimodal model that are not in the file."""
    if parts := multimodal.outside_text(source.base.skeleton()):
        names = ", ".join(f"{part.kind} ({part.name})" for part in parts)
        yield f"the file has the text decoder only; not in it: {names}"


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return the commands that run the file in llama.cpp."""
    path = shell_path(out)
    return [f"{program} -m {path} {template_options(source)}" for program in ("llama-cli", "llama-server")]


def check_tensors(source: ExportSource, out: Path, quantization: GGUFQuantization) -> Check:
    """Compare every tensor of the file with the source, within the rounding error of its type."""
    tensors = plan_tensors(source.base, quantization)
    mismatched = list(mismatched_tensors(gguf.GGUFReader(str(out)), tensors))
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    counts = ", ".join(f"{count} {name}" for name, count in types.items())
    text = (
        f"{len(tensors)} tensors read back, each equal to its source within the rounding error of its type ({counts})"
    )
    if mismatched:
        text = f"{len(mismatched)} of {len(tensors)} tensors differ: {mismatched[0][0]} {mismatched[0][1]}"
    return Check("tensors", not mismatched, text, {"tensors": len(tensors), "strayed": len(mismatched), **types})


def _convert_tokenizer(source: ExportSource) -> GGUFVocabulary:
    return tokenizer.convert_tokenizer(source.tokenizer, source.config, generation_eos=reference.eos_ids(source))
