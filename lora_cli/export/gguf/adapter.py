"""Export format `--to gguf-adapter`: a LoRA adapter as a GGUF file, for llama.cpp's `--lora` with a base model in GGUF.

llama.cpp scales each A and B pair by alpha / rank, with one alpha for all. PEFT's other scalings (rsLoRA, rank_pattern,
alpha_pattern) are multiplied into B.
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
from lora_cli.export.gguf import architectures, llama_cpp_server
from lora_cli.export.gguf.tensors import (
    GGUF_QUANTIZATIONS,
    GGUFQuantization,
    GGUFTensor,
    layer_kind,
    tensor_names,
    write_gguf,
)
from lora_cli.export.gguf.verify import check_outputs, check_tokens, context_length, template_options
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import empty_base
from lora_cli.model.adapter_files import PREFIX
from lora_cli.model.gguf_header import read_gguf_header
from lora_cli.model.multimodal import text_names
from lora_cli.run.read_file import printable
from lora_cli.run.shell import shell_path

DEFAULT_QUANTIZATION = "f32"
QUANTIZATIONS = ("f32", "f16", "bf16")
ADAPTER_NAME = "default"  # PEFT's name of a model's only adapter


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check the quantization, the base's architecture, the adapter's method and options, and `--over`.

    Raises:
        LoraError: one of them is not supported, or `--over` is not the adapter's base.
    """
    name = options.quantize or DEFAULT_QUANTIZATION
    if name not in QUANTIZATIONS:
        raise LoraError(
            f"--quantize {name} is not supported; use one of {', '.join(QUANTIZATIONS)}",
            hint="leave it out for f32",
        )
    architectures.find_architecture(source.config)
    template_options(source)  # raises for a template that cannot be parsed
    config = _config(source)
    unsupported = (
        f"method {str(config.peft_type.value).lower()}" if not isinstance(config, LoraConfig)
        else "DoRA" if config.use_dora
        else f"modules_to_save: {', '.join(config.modules_to_save)}" if config.modules_to_save
        else f"bias: {config.bias}" if config.bias != "none" or config.lora_bias
        else "trainable_token_indices" if config.trainable_token_indices
        else "target_parameters" if config.target_parameters
        else None
    )  # fmt: skip
    if unsupported:
        raise LoraError(
            f"--to gguf-adapter: llama.cpp supports only plain LoRA, but {source.name} has {unsupported}",
            hint="export the merged model: --to gguf",
        )
    _tensors(source, GGUF_QUANTIZATIONS[name])
    if options.over is not None:
        _check_over(source, options.over, GGUF_QUANTIZATIONS[name])


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the adapter."""
    return source.adapter_bytes


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the GGUF file `out`.

    Raises:
        LoraError: llama.cpp does not support LoRA on an adapted layer.
    """
    tensors, alpha = _tensors(source, GGUF_QUANTIZATIONS[options.quantize or DEFAULT_QUANTIZATION])

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(Path(source.name).name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    arch = architectures.find_architecture(source.config).arch
    write_gguf(out, tensors, arch=gguf.MODEL_ARCH_NAMES[arch], describe=describe)


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: updates read back and compared with PEFT's, and outputs of llama.cpp with the base in GGUF.

    Raises:
        LoraError: llama.cpp cannot load the base with the adapter.
    """
    quantization = GGUF_QUANTIZATIONS[options.quantize or DEFAULT_QUANTIZATION]
    yield _check_updates(source, out, quantization)
    if not options.runtime:
        return
    if options.over is None:
        yield Check("note", True, "not run in llama.cpp: no GGUF file of the base is set (--over BASE.gguf)")
        return
    vocab_size = source.config.get_text_config().vocab_size
    with llama_cpp_server.run_llama_cpp(
        options.over, vocab_size=vocab_size, context_length=context_length(source), adapter=out
    ) as runtime:
        yield from check_tokens(source, runtime, reference.eos_ids(source))
        yield from check_outputs(source, reference.ReferenceModel(source), runtime, _quantization_of_file(options.over))


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return the commands that run the adapter in llama.cpp."""
    over, adapter = shell_path(options.over or "BASE.gguf"), shell_path(out)
    return [
        f"{program} -m {over} --lora {adapter} {template_options(source)}" for program in ("llama-cli", "llama-server")
    ]


def _config(source: ExportSource) -> PeftConfig:
    assert source.adapter is not None
    return source.adapter.config


def _attach(source: ExportSource) -> PeftModel:
    """Return the adapter attached to a base without weights."""
    assert source.adapter is not None
    model = empty_base.init_empty_weights(source.base.skeleton())
    return empty_base.attach_saved_adapter(model, source.adapter, base=source.name).model


def _adapted_layers(source: ExportSource) -> Iterator[tuple[str, Any]]:
    """Yield the name of each adapted weight in the text model, and its PEFT layer."""
    text = text_names(source.base.skeleton())
    for name, module in _attach(source).named_modules():
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.scaling:
            weight = name.removeprefix(PREFIX) + ".weight"
            yield text.get(weight, weight), module


def _tensors(source: ExportSource, quantization: GGUFQuantization) -> tuple[list[GGUFTensor], float]:
    """Return the tensors of the file, and its alpha.

    Raises:
        LoraError: llama.cpp does not support LoRA on an adapted layer.
    """
    architecture = architectures.find_architecture(source.config)
    text_config = source.config.get_text_config()
    names = tensor_names(source.config, architecture)
    alpha = float(_config(source).lora_alpha)
    tensors: list[GGUFTensor] = []
    for key, layer in _adapted_layers(source):
        name = names.get_name(key, try_suffixes=(".weight",))
        if (
            name is None
            or ADAPTER_NAME not in layer.lora_A
            or (name == "output.weight" and getattr(text_config, "tie_word_embeddings", False))
        ):
            raise LoraError(
                f"--to gguf-adapter: {key.removesuffix('.weight')} is adapted, but llama.cpp supports no LoRA on it",
                hint="export the merged model: --to gguf",
            )
        a, b = (part[ADAPTER_NAME].weight.detach().float().numpy() for part in (layer.lora_A, layer.lora_B))
        b = b * np.float32(layer.scaling[ADAPTER_NAME] * a.shape[0] / alpha)
        row_order = architecture.row_orders.get(layer_kind(key))
        rows = None if row_order is None else row_order(text_config)
        tensors.append(GGUFTensor(f"{name}.lora_a", a, quantization.type, a.shape))
        tensors.append(GGUFTensor(f"{name}.lora_b", b, quantization.type, b.shape, rows))
    return tensors, alpha


def _check_updates(source: ExportSource, out: Path, quantization: GGUFQuantization) -> Check:
    """Compare each weight update (B @ A, scaled) in the file with PEFT's."""
    file, text_config = GGUFReader(str(out)), source.config.get_text_config()
    architecture = architectures.find_architecture(source.config)
    names = tensor_names(source.config, architecture)
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    # Both sides are fp32 matrix products; a 16-bit type also rounds A and B once each.
    allowed = {GGMLQuantizationType.F32: 1e-5, GGMLQuantizationType.F16: 2.0**-9}.get(quantization.type, 2.0**-6)
    worst, worst_key, count = 0.0, "", 0
    for key, layer in _adapted_layers(source):
        name = names.get_name(key, try_suffixes=(".weight",))
        a, b = stored.pop(f"{name}.lora_a"), stored.pop(f"{name}.lora_b")
        delta = layer.get_delta_weight(ADAPTER_NAME).detach().float().numpy()
        if layer_kind(key) in architecture.transposed:
            delta = delta.T
        row_order = architecture.row_orders.get(layer_kind(key))
        expected = delta if row_order is None else delta[row_order(text_config)]
        error = float(np.abs(alpha / a.shape[0] * (b @ a) - expected).max() / max(np.abs(expected).max(), 1e-30))
        count += 1
        if not error <= worst:
            worst, worst_key = error, key
    text = (
        f"{count} updates read back, equal to PEFT's within {worst:.0e} of their largest value (at most {allowed:.0e})"
    )
    text += f"; largest error: {worst_key}" if worst > allowed else ""
    text += f"; {len(stored)} tensors belong to no update" if stored else ""
    return Check("tensors", worst <= allowed and not stored, text, {"updates": count, "worst": worst})


def _check_over(source: ExportSource, over: Path, quantization: GGUFQuantization) -> None:
    """Compare the base's GGUF file with the adapter.

    Raises:
        LoraError: it is not a GGUF file, or has another architecture or other shapes.
    """
    try:
        header = read_gguf_header(over, hint="give the base's GGUF file")
    except LoraError as error:
        raise LoraError(f"--over: {error.message}", hint=error.hint) from None
    arch = gguf.MODEL_ARCH_NAMES[architectures.find_architecture(source.config).arch]
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    if header.architecture != arch:
        raise LoraError(
            f"--over {over}: its architecture is {printable(header.architecture)}, but the adapter's base is {arch}",
            hint="give the GGUF file of the base that the adapter was trained on",
        )
    for a, b in _a_b_pairs(_tensors(source, quantization)[0]):
        name, shape = a.name.removesuffix(".lora_a"), (b.shape[0], a.shape[1])
        if shapes.get(name) != shape:
            raise LoraError(
                f"--over {over}: {name} is {shapes.get(name, 'missing')}, but the adapter's is {shape}",
                hint="give the GGUF file of the base that the adapter was trained on",
            )


def _a_b_pairs(tensors: list[GGUFTensor]) -> Iterator[tuple[GGUFTensor, GGUFTensor]]:
    yield from zip(tensors[::2], tensors[1::2], strict=True)


def _quantization_of_file(over: Path) -> GGUFQuantization:
    """Return the quantization that most weights of the base have: it sets the tolerances of the output checks."""
    types = [tensor.type for tensor in read_gguf_header(over).tensors.values() if len(tensor.shape) > 1]
    most_common = max(set(types), key=types.count)
    known = {quantization.type: quantization for quantization in GGUF_QUANTIZATIONS.values()}
    return known.get(most_common, GGUF_QUANTIZATIONS["q4_0"])
