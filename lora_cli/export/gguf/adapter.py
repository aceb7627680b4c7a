"""`--to gguf-adapter`: a LoRA alone, for llama.cpp's `--lora` over a base in GGUF.

llama.cpp scales a pair by alpha / rank, with one alpha for all: what PEFT scales otherwise (rank-stabilised LoRA,
patterns of ranks and alphas) goes into B.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer

from lora_cli.errors import LoraError
from lora_cli.export import reference
from lora_cli.export.gguf import architectures, llama_cpp_server, verify
from lora_cli.export.gguf.tensors import (
    GGUF_QUANTIZATIONS,
    GGUFQuantization,
    GGUFTensor,
    layer_kind,
    tensor_names,
    write_gguf,
)
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import base_model, empty_base
from lora_cli.model.load_adapter import PREFIX

DEFAULT_QUANTIZATION = "f32"
QUANTIZATIONS = ("f32", "f16", "bf16")
ADAPTER_NAME = "default"  # PEFT's name for the only one


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """Method, what it trains beside LoRA, and the base's architecture."""
    name = options.quantize or DEFAULT_QUANTIZATION
    if name not in QUANTIZATIONS:
        raise LoraError(
            f"--quantize {name}: an adapter is written as {', '.join(QUANTIZATIONS)}", hint="leave it out: f32"
        )
    architectures.find_architecture(subject.config)
    config = _config(subject)
    found = (
        f"method {str(config.peft_type.value).lower()}" if not isinstance(config, LoraConfig)
        else "DoRA" if config.use_dora
        else f"modules_to_save: {', '.join(config.modules_to_save)}" if config.modules_to_save
        else f"bias: {config.bias}" if config.bias != "none" or config.lora_bias
        else "single tokens" if config.trainable_token_indices
        else "target_parameters" if config.target_parameters
        else None
    )  # fmt: skip
    if found:
        raise LoraError(
            f"--to gguf-adapter: llama.cpp takes plain LoRA, and {subject.name} has {found}",
            hint="export the merged model: --to gguf",
        )
    _tensors(subject, GGUF_QUANTIZATIONS[name])
    if options.over is not None:
        _refuse_other_base(subject, options.over, GGUF_QUANTIZATIONS[name])


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The file `out`."""
    tensors, alpha = _tensors(subject, GGUF_QUANTIZATIONS[options.quantize or DEFAULT_QUANTIZATION])

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(Path(subject.name).name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    arch = architectures.find_architecture(subject.config).arch
    write_gguf(out, tensors, arch=gguf.MODEL_ARCH_NAMES[arch], describe=describe)


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back and multiplied out beside PEFT; in llama.cpp, over the base in GGUF."""
    form = GGUF_QUANTIZATIONS[options.quantize or DEFAULT_QUANTIZATION]
    yield _updates(subject, out, form)
    if not options.runtime:
        return
    if options.over is None:
        yield Check("note", True, "not run in llama.cpp: no base in GGUF was named (--over BASE.gguf)")
        return
    size = subject.config.get_text_config().vocab_size
    with llama_cpp_server.run_llama_cpp(
        options.over, vocabulary=size, context=verify.context_length(subject), adapter=out
    ) as runtime:
        yield from verify.check_tokens(subject, runtime, reference.eos_ids(subject))
        yield from verify.check_outputs(
            subject, reference.ReferenceModel(subject), runtime, _quantization_of_file(options.over)
        )


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """How llama.cpp runs it."""
    over = options.over or "BASE.gguf"
    return [f"llama-cli -m {over} --lora {out} --jinja", f"llama-server -m {over} --lora {out} --jinja"]


def _config(subject: ExportSource) -> PeftConfig:
    assert subject.adapter is not None
    return PeftConfig.from_pretrained(str(subject.adapter))


def _attach(subject: ExportSource) -> PeftModel:
    """The adapter on a base without weights."""
    assert subject.adapter is not None
    model = empty_base.init_empty_weights(base_model.skeleton(subject.config))
    return empty_base.attach_saved_adapter(model, subject.adapter, _config(subject), base=subject.name).model


def _adapted_layers(subject: ExportSource) -> Iterator[tuple[str, Any]]:
    """The base's name of each adapted weight, and PEFT's layer."""
    for name, module in _attach(subject).named_modules():
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.scaling:
            yield name.removeprefix(PREFIX) + ".weight", module


def _tensors(subject: ExportSource, form: GGUFQuantization) -> tuple[list[GGUFTensor], float]:
    """What the file is to hold, and its alpha.

    Raises:
        LoraError: something is adapted that llama.cpp has no place for.
    """
    architecture, text = architectures.find_architecture(subject.config), subject.config.get_text_config()
    names = tensor_names(subject.config, architecture)
    alpha = float(_config(subject).lora_alpha)
    found: list[GGUFTensor] = []
    for key, layer in _adapted_layers(subject):
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None or ADAPTER_NAME not in layer.lora_A or (name == "output.weight" and text.tie_word_embeddings):
            raise LoraError(
                f"--to gguf-adapter: {key.removesuffix('.weight')} is adapted, where llama.cpp takes no LoRA",
                hint="export the merged model: --to gguf",
            )
        a, b = (part[ADAPTER_NAME].weight.detach().float().numpy() for part in (layer.lora_A, layer.lora_B))
        b = b * np.float32(layer.scaling[ADAPTER_NAME] * a.shape[0] / alpha)
        rows = architecture.reordered.get(layer_kind(key))
        found.append(GGUFTensor(f"{name}.lora_a", a, form.type, a.shape))
        found.append(GGUFTensor(f"{name}.lora_b", b, form.type, b.shape, None if rows is None else rows(text)))
    return found, alpha


def _updates(subject: ExportSource, out: Path, form: GGUFQuantization) -> Check:
    """Each update that the file stands for, against PEFT's own."""
    file, text = GGUFReader(str(out)), subject.config.get_text_config()
    architecture = architectures.find_architecture(subject.config)
    names = tensor_names(subject.config, architecture)
    held = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    # Sums of fp32 products on both sides; a narrower format rounds A and B once each.
    allowed = {GGMLQuantizationType.F32: 1e-5, GGMLQuantizationType.F16: 2.0**-9}.get(form.type, 2.0**-6)
    worst, where, count = 0.0, "", 0
    for key, layer in _adapted_layers(subject):
        name = names.get_name(key, try_suffixes=(".weight",))
        a, b = held.pop(f"{name}.lora_a"), held.pop(f"{name}.lora_b")
        delta = layer.get_delta_weight(ADAPTER_NAME).detach().float().numpy()
        if layer_kind(key) in architecture.turned:
            delta = delta.T
        rows = architecture.reordered.get(layer_kind(key))
        expected = delta if rows is None else delta[rows(text)]
        off = float(np.abs(alpha / a.shape[0] * (b @ a) - expected).max() / max(np.abs(expected).max(), 1e-30))
        count += 1
        if not off <= worst:
            worst, where = off, key
    said = f"{count} updates read back, each PEFT's within {worst:.0e} of its largest value (at most {allowed:.0e})"
    said += f"; worst: {where}" if worst > allowed else ""
    said += f"; {len(held)} tensors belong to none" if held else ""
    return Check("tensors", worst <= allowed and not held, said, {"updates": count, "worst": worst})


def _refuse_other_base(subject: ExportSource, over: Path, form: GGUFQuantization) -> None:
    """Hold the base's GGUF against what is adapted.

    Raises:
        LoraError: it is no GGUF, or of another architecture or shape.
    """
    if not over.is_file():
        raise LoraError(f"--over {over}: no such file", hint="name the base's GGUF file")
    try:
        file = GGUFReader(str(over))
    except ValueError as reason:
        raise LoraError(f"--over {over}: no GGUF file: {reason}", hint="name the base's GGUF file") from reason
    arch = gguf.MODEL_ARCH_NAMES[architectures.find_architecture(subject.config).arch]
    found = file.fields[gguf.Keys.General.ARCHITECTURE].contents()
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in file.tensors}
    if found != arch:
        raise LoraError(f"--over {over}: its architecture is {found}, and the adapter's base is {arch}")
    for a, b in _a_b_pairs(_tensors(subject, form)[0]):
        name, shape = a.name.removesuffix(".lora_a"), (b.shape[0], a.shape[1])
        if shapes.get(name) != shape:
            raise LoraError(
                f"--over {over}: {name} is {shapes.get(name, 'missing')}, and the adapter's is {shape}",
                hint="name the GGUF file of the base that the adapter was trained on",
            )


def _a_b_pairs(tensors: list[GGUFTensor]) -> Iterator[tuple[GGUFTensor, GGUFTensor]]:
    yield from zip(tensors[::2], tensors[1::2], strict=True)


def _quantization_of_file(over: Path) -> GGUFQuantization:
    """How near llama.cpp can be to transformers over this base, by the form that most of its weights have."""
    kinds = [tensor.tensor_type for tensor in GGUFReader(str(over)).tensors if len(tensor.shape) > 1]
    most = max(set(kinds), key=kinds.count)
    known = {form.type: form for form in GGUF_QUANTIZATIONS.values()}
    return known.get(most, GGUF_QUANTIZATIONS["q4_0"])
