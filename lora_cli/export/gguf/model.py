"""`--to gguf`: the whole model in one file for llama.cpp and what is built on it."""

from collections.abc import Iterator
from pathlib import Path

import gguf as library

from lora_cli.errors import LoraError
from lora_cli.export import reference
from lora_cli.export.gguf import architectures, llama_cpp_server, tokenizer, verify
from lora_cli.export.gguf.tensors import (
    GGUF_QUANTIZATIONS,
    GGUFQuantization,
    mismatched_tensors,
    plan_tensors,
    write_gguf,
)
from lora_cli.export.gguf.tokenizer import GGUFVocabulary
from lora_cli.export.source import Check, ExportOptions, ExportSource

DEFAULT_QUANTIZATION = "f16"


def quantization_of(options: ExportOptions) -> GGUFQuantization:
    """What `--quantize` names.

    Raises:
        LoraError: nothing that can be written here.
    """
    name = options.quantize or DEFAULT_QUANTIZATION
    if name not in GGUF_QUANTIZATIONS:
        raise LoraError(
            f"--quantize {name} is none that is written here; what is: {', '.join(GGUF_QUANTIZATIONS)}",
            hint="for K-quants write f16, and let llama.cpp make them: llama-quantize IN.gguf OUT.gguf Q4_K_M",
        )
    return GGUF_QUANTIZATIONS[name]


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """Architecture, computation, tokenizer and form, before any weight is read."""
    quantization_of(options)
    if subject.task != "causal-lm":
        raise LoraError(
            f"--to gguf: a {subject.task} model: llama.cpp runs language models",
            hint="use --to onnx or --to safetensors",
        )
    architectures.find_architecture(subject.config)
    _vocabulary(subject)


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The file `out`."""
    form = quantization_of(options)
    tensors = plan_tensors(subject.model, subject.config, form)
    words = _vocabulary(subject)
    architecture = architectures.find_architecture(subject.config)

    def describe(writer: library.GGUFWriter) -> None:
        writer.add_type(library.GGUFType.MODEL)
        writer.add_name(Path(subject.name).name)
        writer.add_file_type(form.file_type)
        if form.bits < 16:
            writer.add_quantization_version(library.GGML_QUANT_VERSION)
        for name, value in architectures.hyperparameters(subject.config, architecture):
            getattr(writer, f"add_{name}")(value)
        tokenizer.add_to_writer(words, writer)

    write_gguf(out, tensors, arch=library.MODEL_ARCH_NAMES[architecture.arch], describe=describe)


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back by the `gguf` package, and run by llama.cpp."""
    form = quantization_of(options)
    yield check_tensors(subject, out, form)
    words = _vocabulary(subject)
    for note in (*architectures.notes(subject.config, architectures.find_architecture(subject.config)), *words.notes):
        yield Check("note", True, note)
    if options.runtime:
        size = subject.config.get_text_config().vocab_size
        with llama_cpp_server.run_llama_cpp(out, vocabulary=size, context=verify.context_length(subject)) as runtime:
            yield from verify.check_tokens(subject, runtime, words.end_of_turn)
            yield from verify.check_outputs(subject, reference.ReferenceModel(subject), runtime, form)


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """How llama.cpp runs it."""
    return [f"llama-cli -m {out} --jinja", f"llama-server -m {out} --jinja"]


def check_tensors(subject: ExportSource, out: Path, form: GGUFQuantization) -> Check:
    """Every tensor of the file against the source, within what its format rounds."""
    tensors = plan_tensors(subject.model, subject.config, form)
    off = list(mismatched_tensors(library.GGUFReader(str(out)), tensors))
    kinds: dict[str, int] = {}
    for placed in tensors:
        kinds[placed.type.name] = kinds.get(placed.type.name, 0) + 1
    held = ", ".join(f"{count} {name}" for name, count in kinds.items())
    said = f"{len(tensors)} tensors read back, each within its format's rounding of the source ({held})"
    if off:
        said = f"{len(off)} of {len(tensors)} tensors are others: {off[0][0]} {off[0][1]}"
    return Check("tensors", not off, said, {"tensors": len(tensors), "strayed": len(off), **kinds})


def _vocabulary(subject: ExportSource) -> GGUFVocabulary:
    return tokenizer.convert_tokenizer(subject.tokenizer, subject.config, generation_eos=reference.eos_ids(subject))
