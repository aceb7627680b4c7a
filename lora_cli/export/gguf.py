"""`--to gguf`: the whole model in one file for llama.cpp and what is built on it."""

from collections.abc import Iterator
from pathlib import Path

import gguf as library

from lora_cli.errors import LoraError
from lora_cli.export import architectures, gguf_file, gguf_proof, llama_cpp, reference, vocabulary
from lora_cli.export.gguf_file import FORMS, Form
from lora_cli.export.subject import Check, Options, Subject
from lora_cli.export.vocabulary import Vocabulary

DEFAULT = "f16"


def form_of(options: Options) -> Form:
    """What `--quantize` names.

    Raises:
        LoraError: nothing that can be written here.
    """
    name = options.quantize or DEFAULT
    if name not in FORMS:
        raise LoraError(
            f"--quantize {name} is none that is written here; what is: {', '.join(FORMS)}",
            hint="for K-quants write f16, and let llama.cpp make them: llama-quantize IN.gguf OUT.gguf Q4_K_M",
        )
    return FORMS[name]


def refuse(subject: Subject, options: Options) -> None:
    """Architecture, computation, tokenizer and form, before any weight is read."""
    form_of(options)
    if subject.task != "causal-lm":
        raise LoraError(
            f"--to gguf: a {subject.task} model: llama.cpp runs language models",
            hint="use --to onnx or --to safetensors",
        )
    architectures.find(subject.config)
    _vocabulary(subject)


def write(subject: Subject, out: Path, options: Options) -> None:
    """The file `out`."""
    form = form_of(options)
    tensors = gguf_file.plan(subject.model, subject.config, form)
    words = _vocabulary(subject)
    architecture = architectures.find(subject.config)

    def describe(writer: library.GGUFWriter) -> None:
        writer.add_type(library.GGUFType.MODEL)
        writer.add_name(Path(subject.name).name)
        writer.add_file_type(form.file_type)
        if form.bits < 16:
            writer.add_quantization_version(library.GGML_QUANT_VERSION)
        for name, value in architectures.parameters(subject.config, architecture):
            getattr(writer, f"add_{name}")(value)
        vocabulary.add(words, writer)

    gguf_file.write(out, tensors, arch=library.MODEL_ARCH_NAMES[architecture.arch], describe=describe)


def prove(subject: Subject, out: Path, options: Options) -> Iterator[Check]:
    """Read back by the `gguf` package, and run by llama.cpp."""
    form = form_of(options)
    yield tensors_check(subject, out, form)
    words = _vocabulary(subject)
    for note in (*architectures.notes(subject.config, architectures.find(subject.config)), *words.notes):
        yield Check("note", True, note)
    if options.runtime:
        size = subject.config.get_text_config().vocab_size
        with llama_cpp.load(out, vocabulary=size, context=gguf_proof.context(subject)) as runtime:
            yield from gguf_proof.words(subject, runtime, words.end_of_turn)
            yield from gguf_proof.numbers(subject, reference.Reference(subject), runtime, form)


def usage(subject: Subject, out: Path, options: Options) -> list[str]:
    """How llama.cpp runs it."""
    return [f"llama-cli -m {out} --jinja", f"llama-server -m {out} --jinja"]


def tensors_check(subject: Subject, out: Path, form: Form) -> Check:
    """Every tensor of the file against the source, within what its format rounds."""
    tensors = gguf_file.plan(subject.model, subject.config, form)
    off = list(gguf_file.strayed(library.GGUFReader(str(out)), tensors))
    kinds: dict[str, int] = {}
    for placed in tensors:
        kinds[placed.type.name] = kinds.get(placed.type.name, 0) + 1
    held = ", ".join(f"{count} {name}" for name, count in kinds.items())
    said = f"{len(tensors)} tensors read back, each within its format's rounding of the source ({held})"
    if off:
        said = f"{len(off)} of {len(tensors)} tensors are others: {off[0][0]} {off[0][1]}"
    return Check("tensors", not off, said, {"tensors": len(tensors), "strayed": len(off), **kinds})


def _vocabulary(subject: Subject) -> Vocabulary:
    return vocabulary.read(subject.tokenizer, subject.config, generation_eos=reference.ends(subject))
